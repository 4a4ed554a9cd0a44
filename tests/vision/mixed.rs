//! Mixed precision: what is promised is measured, in the embedded engine and in onnxruntime.

use super::diagnose::prepared;
use super::toolbox::in_onnxruntime;
use super::{cnn, gelu, onnxruntime, options, samples};
use nibble_models::graph::inputs;
use nibble_models::vision::data::Data;
use nibble_models::vision::mixed::{Attempt, Goal, Judge, Mixed, Precision, allocate};
use nibble_quant::onnx::External;
use std::sync::atomic::AtomicBool;

#[test]
fn a_goal_is_reached_with_as_few_upgrades_as_it_takes_and_measured() {
    let place = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    for (name, float) in [("cnn", cnn()), ("gelu", gelu())] {
        let file = samples(&float, 6, place.path());
        let prepared = prepared(&float, &file, "minmax");
        let data = Data::open(&file, &inputs(&float), options()).unwrap();
        let judge = Judge { data: &data, labels: None, threads: 1, timer: None, stop: &stop };
        let find = |goal| allocate(&prepared, goal, &data, &judge, &|_| ());
        let plain = find(Goal::Sqnr(0.0)).unwrap();
        let db = plain.chosen.sqnr_db.unwrap();
        assert_eq!(plain.chosen.upgrades, 0, "{name}");
        let mut last = (0, plain.chosen.time);
        for more in [3.0, 6.0, 12.0] {
            let mixed = find(Goal::Sqnr(db + more)).unwrap();
            let chosen = &mixed.chosen;
            assert!(chosen.good && chosen.sqnr_db.is_none_or(|found| found >= db + more), "{name}: {chosen:?}");
            assert!(chosen.upgrades > 0 && chosen.time >= last.1 - 1e-9, "{name}: {chosen:?} after {last:?}");
            last = (chosen.upgrades, chosen.time);
            let float_layers = mixed.layers.iter().filter(|l| l.precision >= Precision::Half).count();
            assert!(chosen.upgrades >= float_layers, "{name}");
            let (a, b) = (place.path().join("a.onnx"), place.path().join("b.onnx"));
            float.save(&a, External::Auto).unwrap();
            mixed.model.save(&b, External::Auto).unwrap();
            assert!(std::fs::metadata(&b).unwrap().len().abs_diff(chosen.bytes) < 64, "{name}");
            let words = ["compare", a.to_str().unwrap(), b.to_str().unwrap(), file.to_str().unwrap()];
            let Some(compared) = onnxruntime(&words) else { continue };
            let found = 10.0 * (compared["signal"].as_f64().unwrap() / compared["noise"].as_f64().unwrap()).log10();
            // Its integer kernels round where the embedded engine doesn't.
            assert!(chosen.sqnr_db.is_none_or(|wanted| found > wanted - 1.0), "{name}: {found} and {chosen:?}");
        }
        // A size between that of all integers and that of all floats is used up, not passed.
        let (least, most) = (plain.chosen.bytes, find(Goal::Sqnr(300.0)).unwrap().chosen.bytes);
        assert!(most > least, "{name}");
        let half = (least + most) / 2;
        let fitted = find(Goal::Bytes(half)).unwrap();
        assert!(fitted.chosen.bytes <= half && fitted.chosen.sqnr_db >= plain.chosen.sqnr_db, "{name}");
        let error = find(Goal::Bytes(least / 8)).unwrap_err().to_string();
        assert!(error.contains("weights in 4 bits"), "{error}");
    }
}

#[test]
fn a_size_below_that_of_all_integers_takes_weights_of_4_bits() {
    let place = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let float = gelu();
    let file = samples(&float, 6, place.path());
    let prepared = prepared(&float, &file, "minmax");
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    let judge = Judge { data: &data, labels: None, threads: 1, timer: None, stop: &stop };
    let find = |goal| allocate(&prepared, goal, &data, &judge, &|_| ());
    let integers = find(Goal::Sqnr(0.0)).unwrap().chosen;
    let mut last = integers.sqnr_db.unwrap();
    let packed = |mixed: &Mixed| mixed.layers.iter().filter(|l| l.precision == Precision::Int4).count();
    let mut counts = Vec::new();
    for less in [1, 400] {
        let size = integers.bytes - less;
        let mixed = find(Goal::Bytes(size)).unwrap();
        let Attempt { bytes, sqnr_db, .. } = mixed.chosen;
        assert!(bytes <= size, "{size}: {bytes}");
        assert!(sqnr_db.unwrap() <= last, "{last} dB, {sqnr_db:?} in less");
        last = sqnr_db.unwrap();
        counts.push(packed(&mixed));
        let nodes = &mixed.model.graph().node;
        assert_eq!(nodes.iter().filter(|n| n.op_type() == "MatMulNBits").count(), packed(&mixed));
        let Some(found) = in_onnxruntime([&float, &mixed.model], &file, place.path()) else { continue };
        assert!((found - last).abs() < 1.0, "{found} dB in onnxruntime, {last} here");
    }
    assert!(counts[0] > 0 && counts[1] >= counts[0], "{counts:?}");
}
