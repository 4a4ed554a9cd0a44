//! `nibble vision train` and `nibble vision qat`: from a file of digits to a file of integers.

use crate::support::Place;

/// A folder with `data.csv`: pictures of 8 x 8 whose class is the half that is bright.
fn place() -> Place {
    let place = Place::new();
    let mut text = String::new();
    for sample in 0..48u32 {
        let class = sample % 2;
        for pixel in 0..64u32 {
            let bright = (pixel / 32 == class) as u32;
            text.push_str(&format!("{},", 150 * bright + (pixel * 37 + sample * 101) % 83));
        }
        text.push_str(&format!("{class}\n"));
    }
    std::fs::write(place.path("data.csv"), text).unwrap();
    place
}

const DATA: [&str; 4] = ["--data", "data.csv", "--holdout", "8"];

#[test]
fn a_model_is_trained_and_trained_again_in_integers() {
    let place = place();
    let train =
        [&["vision", "train", "--arch", "cnn", "-o", "float.onnx", "--epochs", "6", "--batch-size", "8"], &DATA[..]]
            .concat();
    let made = place.run(&[&train[..], &["--json"]].concat()).json();
    assert_eq!((made["valid"]["samples"].as_u64(), made["epochs"].as_array().unwrap().len()), (Some(8), 6));
    assert_eq!(made["valid"]["accuracy"], 1.0, "{made}");
    assert!(place.run(&train).error(1).contains("float.onnx: is there already"));
    let first = std::fs::read(place.path("float.onnx")).unwrap();
    place.run(&[&train[..], &["--force", "--threads", "1"]].concat()).ok();
    assert_eq!(std::fs::read(place.path("float.onnx")).unwrap(), first, "the same seed gives the same bytes");

    let qat = [
        "vision",
        "qat",
        "float.onnx",
        "-o",
        "int.onnx",
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--checkpoint",
        "state.safetensors",
    ];
    let qat = [&qat[..], &DATA].concat();
    let made = place.run(&[&qat[..], &["--lsq", "--weight-bits", "4", "--distill", "--json"]].concat()).json();
    assert_eq!((made["float"].as_f64(), made["epochs"].as_array().unwrap().len()), (Some(1.0), 2), "{made}");
    assert_eq!(made["bytes_out"], std::fs::metadata(place.path("int.onnx")).unwrap().len());
    assert!(made["bytes_out"].as_u64().unwrap() * 3 < made["bytes_in"].as_u64().unwrap(), "{made}");
    let inspected = place.run(&["vision", "inspect", "int.onnx", "--json"]).json();
    assert!(inspected["weights"].as_array().unwrap().iter().any(|w| w["type"] == "int8"), "{inspected}");
    // From a checkpoint of all epochs nothing is left to do; of another training it is refused.
    let again = [&qat[..], &["--lsq", "--weight-bits", "4", "--distill", "--resume", "--force"]].concat();
    let whole = std::fs::read(place.path("int.onnx")).unwrap();
    place.run(&again).ok();
    assert_eq!(std::fs::read(place.path("int.onnx")).unwrap(), whole);
    let other = place.run(&[&again[..], &["--seed", "7"]].concat());
    assert!(other.error(1).contains("state.safetensors: is of another training"), "{}", other.stderr);
    let mut names = place.names();
    names.retain(|name| name != "state");
    assert_eq!(names, ["data.csv", "float.onnx", "int.onnx", "state.safetensors"]);
}

#[test]
fn wrong_words_are_refused_before_anything_is_trained() {
    let place = place();
    for (words, code, says) in [
        (&["train", "--arch", "magic", "-o", "a.onnx", "--data", "data.csv"][..], 1, "known: cnn, vit"),
        (&["train", "--arch", "cnn", "-o", "a.onnx", "--data", "nowhere.csv"], 1, "nowhere.csv"),
        (
            &["train", "--arch", "cnn", "-o", "a.onnx", "--data", "data.csv", "--holdout", "48"],
            1,
            "data.csv: 48 samples",
        ),
        (&["train", "--arch", "cnn", "-o", "a.onnx", "--data", "data.csv", "--batch-size", "0"], 2, "--batch-size 0"),
        (&["train", "--arch", "cnn", "-o", "a.onnx", "--data", "data.csv", "--resume"], 2, "--checkpoint"),
        (&["qat", "nowhere.onnx", "-o", "a.onnx", "--data", "data.csv"], 1, "nowhere.onnx"),
        (&["qat", "data.csv", "-o", "a.onnx", "--data", "data.csv"], 1, "data.csv"),
        (&["qat", "data.csv", "-o", "a.onnx", "--data", "data.csv", "--weight-bits", "9"], 2, "2..=8"),
        (&["qat", "data.csv", "-o", "a.onnx", "--data", "data.csv", "--observer", "guess"], 2, "observer `guess`"),
    ] {
        let ended = place.run(&[&["vision"], words].concat());
        assert!(ended.stderr.contains(says) && ended.code == code, "{words:?}: {} {}", ended.code, ended.stderr);
    }
    assert!(!place.path("a.onnx").exists());
}
