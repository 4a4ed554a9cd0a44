//! From a folded float model to everything that quantizing it needs: equalized, planned, calibrated.

use super::calibrate::{
    CalibrateOptions, calibrate, equalize_and_calibrate, equalize_channels, equalize_weights, one_run_is_enough,
    room_of_second_terms,
};
use super::data::Data;
use crate::Result;
use nibble_quant::onnx::{Calibration, Folded, Model, Plan, Settings, plan, qdq};

/// What a quantized model is made of.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The float model, folded; with equal channels, if that was wanted.
    pub model: Model,
    /// What folding did.
    pub folded: Folded,
    /// What becomes of each node.
    pub plan: Plan,
    /// What samples showed.
    pub calibration: Calibration,
    /// What ranges of activations are multiplied by that get a second term later.
    pub room: f32,
}

/// What is brought to like ranges before rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Equalize {
    /// Nothing.
    Nothing,
    /// Channels of activations: for weights with a scale an output channel.
    Channels,
    /// Channels of neighbouring layers' weights: for weights with one scale.
    Weights,
}

/// How often [`prepare`] runs over the samples.
pub fn runs(plan: &Plan, equalize: Equalize, options: &CalibrateOptions) -> u64 {
    match equalize {
        Equalize::Nothing => 1,
        Equalize::Channels => 2 - u64::from(one_run_is_enough(plan, options)),
        Equalize::Weights => 2,
    }
}

/// Equalizes if that is wanted, plans, and calibrates. `progress` is called after each sample of each run.
///
/// # Errors
/// As [`calibrate`], and settings that contradict each other.
pub fn prepare(
    mut model: Model,
    folded: Folded,
    settings: &Settings,
    data: &Data,
    equalize: Equalize,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<Prepared> {
    let make = |model: &Model| plan(model, settings, &folded);
    let before = make(&model)?;
    let once = runs(&before, equalize, options) == 1;
    let (plan, calibration) = match equalize {
        Equalize::Channels if once => equalize_and_calibrate(&mut model, &make, data, options, progress)?,
        _ => {
            match equalize {
                Equalize::Nothing => {}
                Equalize::Channels => drop(equalize_channels(&mut model, &before, data, options, progress)?),
                Equalize::Weights => drop(equalize_weights(&mut model, data, options, progress)?),
            }
            let plan = make(&model)?;
            let calibration = calibrate(&model, &plan, data, options, progress)?;
            (plan, calibration)
        }
    };
    let room = room_of_second_terms(options.headroom);
    let mut prepared = Prepared { model, folded, plan, calibration, room };
    prepared.spread();
    Ok(prepared)
}

impl Prepared {
    /// Of a plan that needs nothing of samples.
    pub fn uncalibrated(model: Model, folded: Folded, plan: Plan) -> Prepared {
        Prepared { model, folded, plan, calibration: Calibration::default(), room: 1.0 }
    }

    /// Tensors that share another one's scale get its range: with other settings they may have to have their own.
    fn spread(&mut self) {
        let Prepared { plan, calibration, .. } = self;
        for (tensor, root) in &plan.scales {
            let range = plan.fixed.get(root).or_else(|| calibration.ranges.get(root)).copied();
            if let Some(range) = range {
                calibration.ranges.entry(tensor.clone()).or_insert(range);
            }
        }
    }

    /// The model in integers, as planned.
    ///
    /// # Errors
    /// As [`qdq::quantize`].
    pub fn quantize(&self) -> Result<Model> {
        Ok(qdq::quantize(&self.model, &self.plan, &self.calibration)?)
    }

    /// The model in integers with other settings; ranges are those that were seen.
    ///
    /// # Errors
    /// As [`qdq::quantize`], and settings that contradict each other.
    pub fn quantize_with(&self, settings: &Settings) -> Result<(Plan, Model)> {
        let plan = plan(&self.model, settings, &self.folded)?;
        let model = qdq::quantize(&self.model, &plan, &self.calibration)?;
        Ok((plan, model))
    }
}
