//! From a picture to a model's input: decode, resize, crop, normalize.
//!
//! ```text
//! file -> RGB -> shorter side to `resize` -> centre (or a drawn) crop -> (value / 255 - mean) / std -> NCHW or NHWC
//! ```

use crate::{ModelError, Result};
use image::imageops::{FilterType, crop_imm, flip_horizontal, resize};
use image::{ImageReader, RgbImage};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::path::Path;

/// How pictures become inputs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocess {
    /// The word for it.
    pub name: &'static str,
    /// What it is for.
    pub summary: &'static str,
    /// Mean of each channel, of values in 0..=1.
    pub mean: [f32; 3],
    /// Deviation of each channel.
    pub std: [f32; 3],
    /// The shorter side before the crop, over the crop's side.
    pub margin: f32,
}

/// Every known way.
pub static PREPROCESS: &[Preprocess] = &[
    Preprocess {
        name: "imagenet",
        summary: "ImageNet's mean and deviation: ResNet, ViT, DINOv2 and most others",
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        margin: 256.0 / 224.0,
    },
    Preprocess {
        name: "lite",
        summary: "(pixel - 127) / 128: EfficientNet-Lite and MobileNets from TensorFlow",
        mean: [127.0 / 255.0; 3],
        std: [128.0 / 255.0; 3],
        margin: 256.0 / 224.0,
    },
    Preprocess {
        name: "half",
        summary: "mean and deviation 0.5: values in -1..=1",
        mean: [0.5; 3],
        std: [0.5; 3],
        margin: 256.0 / 224.0,
    },
    Preprocess {
        name: "clip",
        summary: "CLIP's mean and deviation",
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        margin: 1.0,
    },
    Preprocess { name: "unit", summary: "values in 0..=1", mean: [0.0; 3], std: [1.0; 3], margin: 1.0 },
    Preprocess { name: "pixel", summary: "values in 0..=255", mean: [0.0; 3], std: [1.0 / 255.0; 3], margin: 1.0 },
];

/// The way of that name.
///
/// # Errors
/// There is none; what there is is said.
pub fn preprocess(name: &str) -> Result<Preprocess> {
    PREPROCESS.iter().find(|p| p.name == name).copied().ok_or_else(|| ModelError::Setting {
        what: format!("preprocessing `{name}`"),
        why: format!("unknown; known: {}", PREPROCESS.iter().map(|p| p.name).collect::<Vec<_>>().join(", ")),
    })
}

/// Where channels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelOrder {
    /// (channels, height, width).
    First,
    /// (height, width, channels).
    Last,
}

/// A model's picture: its size and layout.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Frame {
    /// Pixels.
    pub height: usize,
    /// Pixels.
    pub width: usize,
    /// Where channels are.
    pub order: ChannelOrder,
    /// 1 or 3.
    pub channels: usize,
    /// Blue first.
    pub bgr: bool,
}

/// Reads a picture.
///
/// # Errors
/// A file that can't be read or isn't a JPEG or PNG, and pictures without pixels.
pub fn read(path: &Path) -> Result<RgbImage> {
    let damaged = |why: String| ModelError::Damaged { path: path.to_owned(), why };
    let reader =
        ImageReader::open(path).map_err(ModelError::io(path))?.with_guessed_format().map_err(ModelError::io(path))?;
    let picture = reader.decode().map_err(|e| damaged(format!("not a picture that can be read: {e}")))?.to_rgb8();
    if picture.width() == 0 || picture.height() == 0 {
        return Err(damaged("a picture without pixels".into()));
    }
    Ok(picture)
}

/// The middle of a picture at a frame's size.
pub fn centre(picture: &RgbImage, frame: Frame, how: &Preprocess) -> RgbImage {
    let (w, h) = (f64::from(picture.width()), f64::from(picture.height()));
    let margin = f64::from(how.margin);
    // The smallest scale at which the frame and its margin are covered.
    let scale = (frame.width as f64 * margin / w).max(frame.height as f64 * margin / h);
    let (rw, rh) = ((w * scale).round().max(frame.width as f64), (h * scale).round().max(frame.height as f64));
    let resized = resize(picture, rw as u32, rh as u32, FilterType::Triangle);
    let (x, y) = ((rw as usize - frame.width) / 2, (rh as usize - frame.height) / 2);
    crop_imm(&resized, x as u32, y as u32, frame.width as u32, frame.height as u32).to_image()
}

/// Draws crops of a picture: a quarter to all of its area, sides 3:4 to 4:3, every other one mirrored. The same seed
/// draws the same crops.
pub fn crops(picture: &RgbImage, frame: Frame, count: usize, seed: u64) -> impl Iterator<Item = RgbImage> {
    let mut rng = StdRng::seed_from_u64(seed);
    let (w, h) = (f64::from(picture.width()), f64::from(picture.height()));
    (0..count).map(move |i| {
        let area = w * h * rng.random_range(0.25..1.0);
        let ratio =
            rng.random_range(0.75f64.ln()..(4.0f64 / 3.0).ln()).exp() * frame.width as f64 / frame.height as f64;
        let (cw, ch) = ((area * ratio).sqrt().min(w).max(1.0), (area / ratio).sqrt().min(h).max(1.0));
        let (x, y) = (rng.random_range(0.0..=1.0) * (w - cw), rng.random_range(0.0..=1.0) * (h - ch));
        let cropped = crop_imm(picture, x as u32, y as u32, cw as u32, ch as u32).to_image();
        let sized = resize(&cropped, frame.width as u32, frame.height as u32, FilterType::Triangle);
        if i % 2 == 1 { flip_horizontal(&sized) } else { sized }
    })
}

/// A picture's values as a model takes them: `channels * height * width` floats.
pub fn values(picture: &RgbImage, frame: Frame, how: &Preprocess) -> Vec<f32> {
    let (h, w, c) = (frame.height, frame.width, frame.channels);
    let mut out = vec![0.0; c * h * w];
    for (x, y, pixel) in picture.enumerate_pixels() {
        let at = y as usize * w + x as usize;
        let luma = || {
            let [r, g, b] = pixel.0.map(f32::from);
            (0.299 * r + 0.587 * g + 0.114 * b, (how.mean[1], how.std[1]))
        };
        for channel in 0..c {
            let (raw, (mean, std)) = match c {
                1 => luma(),
                _ => {
                    let from = if frame.bgr { 2 - channel } else { channel };
                    (f32::from(pixel.0[from]), (how.mean[from], how.std[from]))
                }
            };
            let value = (raw / 255.0 - mean) / std;
            match frame.order {
                ChannelOrder::First => out[channel * h * w + at] = value,
                ChannelOrder::Last => out[at * c + channel] = value,
            }
        }
    }
    out
}
