//! `nibble vision`: ONNX models of pictures (and other encoders) in 8-bit integers.

mod data;
mod diagnose;
mod engine;
mod eval;
mod export;
mod inspect;
mod mixed;
pub(super) mod page;
mod qat;
mod quantize;
mod quantized;
mod recipe;
mod train;

use super::Run;
use crate::session::Session;
use anyhow::Result;

/// Quantize ONNX models (CNNs, Vision Transformers, encoders) to integers that ONNX Runtime runs fast, and judge them
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Example: nibble vision quantize model.onnx -o model-int8.onnx --calib photos"
)]
pub struct Vision {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Quantize(quantize::Quantize),
    Inspect(inspect::Inspect),
    Eval(eval::Eval),
    Diagnose(diagnose::Diagnose),
    Export(export::Export),
    Data(data::Data),
    Train(train::Train),
    Qat(qat::Qat),
}

impl Run for Vision {
    fn run(self, session: &Session) -> Result<()> {
        match self.what {
            What::Quantize(quantize) => quantize.run(session),
            What::Inspect(inspect) => inspect.run(session),
            What::Eval(eval) => eval.run(session),
            What::Diagnose(diagnose) => diagnose.run(session),
            What::Export(export) => export.run(session),
            What::Data(data) => data.run(session),
            What::Train(train) => train.run(session),
            What::Qat(qat) => qat.run(session),
        }
    }
}
