//! Samples with labels: what is read, and what is refused by name.

use candle_core::{DType, Device, Tensor};
use nibble_models::qat::dataset::{Augment, Dataset};
use nibble_models::vision::picture::{ChannelOrder, Frame, preprocess};
use std::io::Write;
use std::path::Path;

fn open(path: &Path) -> Result<Dataset, String> {
    Dataset::open(path, "image", None, None).map_err(|e| e.to_string())
}

fn packed(path: &Path, text: &str) {
    let mut out = flate2::write::GzEncoder::new(std::fs::File::create(path).unwrap(), flate2::Compression::fast());
    out.write_all(text.as_bytes()).unwrap();
    out.finish().unwrap();
}

#[test]
fn rows_arrays_and_folders_become_pictures() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let text = "0,255,51,102,3\n1,2,3,4,0\n";
    std::fs::write(at("a.csv"), text).unwrap();
    packed(&at("a.csv.gz"), text);
    let values = [0.0, 1.0, 0.2, 0.4, 1.0 / 255.0, 2.0 / 255.0, 3.0 / 255.0, 4.0 / 255.0];
    for name in ["a.csv", "a.csv.gz"] {
        let data = open(&at(name)).unwrap();
        assert_eq!((data.len(), &data.dims[..], data.classes()), (2, &[1, 2, 2][..], Some(4)), "{name}");
        assert_eq!((data.values, data.labels), (values.to_vec(), Some(vec![3, 0])), "{name}");
    }
    let x = Tensor::from_vec(values.to_vec(), (2, 1, 2, 2), &Device::Cpu).unwrap();
    let y = Tensor::new(&[3i64, 0], &Device::Cpu).unwrap();
    Tensor::write_npz(&[("x", x.clone()), ("y", y)], at("b.npz")).unwrap();
    x.write_npy(at("c.npy")).unwrap();
    let (npz, npy) = (open(&at("b.npz")).unwrap(), open(&at("c.npy")).unwrap());
    assert_eq!((npz.values, npz.labels), (values.to_vec(), Some(vec![3, 0])));
    assert_eq!((npy.values, npy.labels), (values.to_vec(), None));
    // A folder for each class, in the order of their names.
    for (folder, light) in [("dark", 0u8), ("light", 255)] {
        std::fs::create_dir_all(at("classes").join(folder)).unwrap();
        for i in 0..2 {
            let picture = image::GrayImage::from_pixel(4, 4, image::Luma([light]));
            picture.save(at("classes").join(folder).join(format!("{i}.png"))).unwrap();
        }
    }
    let frame = Frame { height: 2, width: 2, order: ChannelOrder::First, channels: 1, bgr: false };
    let data = Dataset::open(&at("classes"), "image", None, Some((frame, preprocess("unit").unwrap()))).unwrap();
    assert_eq!((data.dims, data.labels), (vec![1, 2, 2], Some(vec![0, 0, 1, 1])));
    assert_eq!(data.values, [vec![0.0; 8], vec![1.0; 8]].concat());
}

#[test]
fn damaged_samples_are_named_by_file_and_row() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
    write("word.csv", "1,2,3,4,0\n1,2,x,4,0\n");
    write("short.csv", "1,2,3,4,0\n1,2,3,0\n");
    write("class.csv", "1,2,3,4,0.5\n");
    write("negative.csv", "1,2,3,4,-1\n");
    write("infinite.csv", "1,2,inf,4,0\n");
    write("flat.csv", "1,2,3,0\n");
    write("empty.csv", "");
    write("no.csv.gz", "not packed");
    write("no.npz", "not an archive");
    write("no.npy", "not an array");
    write("model.onnx", "x");
    packed(&at("cut.csv.gz"), &"1,2,3,4,0\n".repeat(500));
    let whole = std::fs::read(at("cut.csv.gz")).unwrap();
    std::fs::write(at("cut.csv.gz"), &whole[..whole.len() / 2]).unwrap();
    let x = Tensor::zeros((3, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
    let y = Tensor::new(&[0i64, 1], &Device::Cpu).unwrap();
    Tensor::write_npz(&[("x", x.clone()), ("y", y)], at("labels.npz")).unwrap();
    Tensor::write_npz(&[("z", x)], at("name.npz")).unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    for (name, says) in [
        ("word.csv", "row 2: `x`"),
        ("short.csv", "row 2: 3 values"),
        ("class.csv", "row 1: class 0.5"),
        ("negative.csv", "row 1: class -1"),
        ("infinite.csv", "sample 0 has a value inf"),
        ("flat.csv", "are no pictures"),
        ("empty.csv", "holds no sample"),
        ("no.csv.gz", ""),
        ("cut.csv.gz", ""),
        ("no.npz", ""),
        ("no.npy", ""),
        ("model.onnx", "wanted .csv"),
        ("labels.npz", "2 labels for 3 samples"),
        ("name.npz", "has no array `x` or `image`"),
        ("folder", "is a folder"),
        ("nowhere.csv", ""),
    ] {
        let error = open(&at(name)).unwrap_err();
        assert!(error.contains(name) && error.contains(says), "{name}: {error}");
    }
    let wrong = Dataset::open(&at("word.csv"), "x", Some(&[1, 3, 3]), None).unwrap_err().to_string();
    assert!(wrong.contains("word.csv"), "{wrong}");
    write("good.csv", "1,2,3,4,0\n");
    let wrong = Dataset::open(&at("good.csv"), "x", Some(&[1, 3, 3]), None).unwrap_err().to_string();
    assert!(wrong.contains("the model takes [1, 3, 3]"), "{wrong}");
}

#[test]
fn a_split_loses_nothing_and_pictures_move_by_whole_pixels() {
    let data = super::quarters(50, 1);
    let (rest, drawn) = data.split(20, 7).unwrap();
    assert_eq!((rest.len(), drawn.len()), (30, 20));
    let sum = |d: &Dataset| d.values.iter().map(|&v| f64::from(v)).sum::<f64>();
    assert!((sum(&rest) + sum(&drawn) - sum(&data)).abs() < 1e-3);
    assert!(data.split(50, 0).is_err());
    let (still, labels) = data.batch(&[3, 4], Augment::default(), 9).unwrap();
    assert_eq!(super::flat(&still), data.values[3 * 64..5 * 64]);
    assert_eq!(labels.unwrap().to_vec1::<u32>().unwrap(), data.labels.as_ref().unwrap()[3..5]);
    let moved = |draw| super::flat(&data.batch(&[3, 4], Augment { shift: 2 }, draw).unwrap().0);
    assert_eq!(moved(1), moved(1));
    assert_ne!(moved(1), moved(2));
    // Each value that isn't 0 was in the picture.
    assert!(moved(1)[..64].iter().all(|v| *v == 0.0 || data.values[3 * 64..4 * 64].contains(v)));
}
