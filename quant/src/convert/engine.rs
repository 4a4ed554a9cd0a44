//! Does the work of a conversion: blocks of rows in parallel, each to its own place in the output.

use super::plan::{Quantize, Rows};
use super::progress::Stage;
use super::sums::Sums;
use super::{Progress, Sidecar, sidecars, verify};
use crate::QuantError;
use crate::error::Result;
use crate::first::first_where;
use crate::format::native;
use crate::format::shards::{Bundle, Layout, SHARD_BYTES, ShardFiles};
use crate::format::source::{Dtype, Stored, decode_rows, encode_f32, first_non_finite};
use crate::format::{Done, OutputDir, OutputOptions, TensorInfo, TensorSource, tensor_error};
use crate::manifest::{FileRecord, MANIFEST, Manifest, SourceRecord, TensorRecord, hex};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Values of a block of rows, one core's work between two waits for the others. Fixed, because sums of errors are made
/// block by block and must not depend on the machine.
pub(super) const BLOCK_VALUES: usize = 1 << 20;

/// Values that are worked on at the same time: enough to keep many cores busy, and few enough that the output's memory
/// doesn't matter.
pub(super) const WINDOW_VALUES: usize = 8 << 20;

/// Values of a block whose rows share something that takes long to make: only the largest models' tensors have more.
const SHARED_VALUES: usize = 64 << 20;

/// How to write.
#[derive(Debug)]
pub struct Options<'a> {
    /// What to do with what is already there.
    pub output: OutputOptions,
    /// Largest tensor bytes of a shard.
    pub shard_bytes: u64,
    /// Seed of whatever is random; part of the fingerprint and the manifest.
    pub seed: u64,
    /// Set by another thread (Ctrl-C) to stop after the blocks in flight.
    pub stop: Option<&'a AtomicBool>,
    /// Files to put beside the weights that the source doesn't hold as files (a GGUF's configuration and tokenizer)
    /// or that replace one of its files, with their relative paths.
    pub extra: Vec<(PathBuf, Vec<u8>)>,
    /// Looks at the finished folder before it gets its name; what it refuses is removed.
    pub judge: Option<Judge<'a>>,
}

/// Looks at a folder that is whole and verified, and says whether it may stay.
#[derive(Clone, Copy)]
pub struct Judge<'a>(pub &'a (dyn Fn(&Path) -> Result<()> + Sync));

impl std::fmt::Debug for Judge<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Judge")
    }
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            output: OutputOptions::default(),
            shard_bytes: SHARD_BYTES,
            seed: 0,
            stop: None,
            extra: Vec::new(),
            judge: None,
        }
    }
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The finished folder.
    pub path: PathBuf,
    /// One row a tensor, in file order.
    pub tensors: Vec<TensorRecord>,
    /// Tensor bytes read.
    pub bytes_in: u64,
    /// Bytes of the weight files written.
    pub bytes_out: u64,
    /// Tensors that an earlier run had finished.
    pub resumed: usize,
    /// Seconds from opening the output to its final name.
    pub seconds: f64,
}

impl Report {
    /// Source megabytes (10^6 bytes) a second.
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes_in as f64 / 1e6 / self.seconds.max(1e-9)
    }
}

/// What becomes of one tensor.
#[derive(Debug, Clone)]
pub(super) enum Work {
    /// The same bytes.
    Copy,
    /// Floats of a type.
    Floats(Dtype),
    /// Codes.
    Quantize(Quantize),
}

/// One tensor to convert.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub info: TensorInfo,
    /// Its name in the output.
    pub name: String,
    pub work: Work,
    pub bundle: Bundle,
    /// How it is called in reports.
    pub stored: String,
}

/// How the manifest calls this run.
pub(super) struct Made {
    pub by: &'static str,
    pub recipe: String,
    pub seed: u64,
}

pub(super) struct Engine<'a> {
    pub source: &'a dyn TensorSource,
    pub items: &'a [Item],
    pub made: Made,
    pub options: &'a Options<'a>,
    pub progress: &'a dyn Progress,
}

struct Block {
    item: usize,
    rows: Range<usize>,
}

impl Engine<'_> {
    /// Converts everything into `out`, verifies it and gives it its name. A failure that another run can't do better,
    /// such as a value that isn't finite, leaves nothing behind; after others the message says what is kept and where.
    pub fn run(&self, out: &Path) -> Result<Report> {
        let started = Instant::now();
        let mut sidecars = sidecars(self.source.path())?;
        sidecars.retain(|(_, relative)| !self.options.extra.iter().any(|(own, _)| own == relative));
        let bundles: Vec<Bundle> = self.items.iter().map(|i| i.bundle.clone()).collect();
        let common = match self.made.by {
            "quantize" => native::common_metadata(),
            _ => BTreeMap::from([("format".to_owned(), "pt".to_owned())]),
        };
        let layout = Layout::new(&bundles, &common, self.options.shard_bytes)?;
        let fingerprint = self.fingerprint(&layout)?;
        let output = OutputDir::create(out, &[self.source.path()], &fingerprint, self.options.output)?;
        match self.fill(&output, &layout, &sidecars) {
            Ok((tensors, resumed)) => {
                let (path, seconds) = (output.target().to_owned(), started.elapsed().as_secs_f64());
                let (bytes_in, bytes_out) = (self.bytes_in(), layout.total_bytes());
                Ok(Report { path, tensors, bytes_in, bytes_out, resumed, seconds })
            }
            Err(why) => {
                if output.abandon(&why) {
                    let kept = output.partial().display();
                    self.progress
                        .message(&format!("{kept} keeps what is done: --resume goes on, deleting it gives up"));
                }
                Err(why)
            }
        }
    }

    fn fill(&self, output: &OutputDir, layout: &Layout, sidecars: &[Sidecar]) -> Result<(Vec<TensorRecord>, usize)> {
        output.check_space(layout.total_bytes() + sidecar_bytes(sidecars))?;
        let shards = ShardFiles::create(layout, output)?;
        self.progress.start(Stage::Convert, self.items.len(), self.bytes_in());
        let (tensors, resumed) = self.tensors(output, &shards)?;
        for (from, relative) in sidecars {
            output.copy(from, relative)?;
        }
        for (relative, bytes) in &self.options.extra {
            output.write(relative, bytes)?;
        }
        let manifest = self.manifest(output, layout, sidecars, &tensors)?;
        output.write(Path::new(MANIFEST), &manifest.to_bytes()?)?;
        output.commit(|dir| self.options.judge.map_or(Ok(()), |judge| (judge.0)(dir)))?;
        Ok((tensors, resumed))
    }

    fn stopped(&self) -> bool {
        self.options.stop.is_some_and(|s| s.load(Ordering::Relaxed))
    }

    fn bytes_in(&self) -> u64 {
        self.items.iter().map(|i| i.info.bytes as u64).sum()
    }

    /// Converts what no earlier run has finished. Blocks are taken in order, as many at once as together have no more
    /// values than [`WINDOW_VALUES`] (or the one that alone has more).
    fn tensors(&self, output: &OutputDir, shards: &ShardFiles) -> Result<(Vec<TensorRecord>, usize)> {
        let mut records: Vec<Option<TensorRecord>> = vec![None; self.items.len()];
        let mut pending = Vec::new();
        for (at, item) in self.items.iter().enumerate() {
            match self.finished_before(item, output, shards)? {
                Some(sums) => {
                    self.progress.advance(item.info.bytes as u64);
                    records[at] = Some(self.finish(item, sums));
                }
                None => pending.extend(item.blocks().into_iter().map(|rows| Block { item: at, rows })),
            }
        }
        let resumed = records.iter().flatten().count();
        // Blocks come in order, so one tensor at a time is half done.
        let (mut total, mut hash) = (Sums::default(), Sha256::new());
        let mut rest = pending.as_slice();
        while !rest.is_empty() {
            if self.stopped() {
                return Err(QuantError::Stopped);
            }
            let (window, after) = rest.split_at(window(rest.iter().map(|b| self.items[b.item].values(&b.rows))));
            let results: Vec<(Sums, [u8; 32])> =
                window.par_iter().map(|block| self.block(block, shards)).collect::<Result<_>>()?;
            for (block, (sums, digest)) in window.iter().zip(results) {
                let item = &self.items[block.item];
                if block.rows.start == 0 {
                    (total, hash) = (Sums::default(), Sha256::new());
                }
                total = total.and(sums);
                hash.update(digest);
                if block.rows.end == item.units() {
                    self.source.release(&item.info.name);
                    let note = serde_json::to_value(total).unwrap_or_default();
                    let sha256 = hex(&std::mem::take(&mut hash).finalize());
                    output.note(&Done { name: item.name.clone(), sha256, note })?;
                    records[block.item] = Some(self.finish(item, total));
                }
            }
            rest = after;
        }
        Ok((records.into_iter().flatten().collect(), resumed))
    }

    fn finish(&self, item: &Item, sums: Sums) -> TensorRecord {
        let bytes: u64 = item.bundle.slots.iter().map(|s| s.bytes() as u64).sum();
        let values = item.info.elements();
        let record = TensorRecord {
            name: item.name.clone(),
            shape: item.info.shape.clone(),
            stored: item.stored.clone(),
            bytes,
            bits_per_weight: if values == 0 { 0.0 } else { bytes as f64 * 8.0 / values as f64 },
            quantized: matches!(item.work, Work::Quantize(_)),
            sqnr_db: sums.sqnr_db(),
        };
        self.progress.tensor_done(&record);
        record
    }

    /// The sums of a tensor that the journal says is finished and whose bytes agree.
    fn finished_before(&self, item: &Item, output: &OutputDir, shards: &ShardFiles) -> Result<Option<Sums>> {
        let Some(done) = output.done(&item.name) else { return Ok(None) };
        let mut whole = Sha256::new();
        let mut buffer = Vec::new();
        for rows in item.blocks() {
            let mut hash = Sha256::new();
            for (name, range) in item.places(&rows) {
                buffer.resize(range.len(), 0);
                shards.read(&name, range.start, &mut buffer)?;
                hash.update(&buffer);
            }
            whole.update(hash.finalize());
        }
        match hex(&whole.finalize()) == done.sha256 {
            true => Ok(serde_json::from_value(done.note.clone()).ok()),
            false => {
                self.progress.message(&format!("{}: differs from the journal, done again", item.name));
                Ok(None)
            }
        }
    }

    /// Converts and writes one block: what it sums to, and the hash of its bytes.
    fn block(&self, block: &Block, shards: &ShardFiles) -> Result<(Sums, [u8; 32])> {
        let item = &self.items[block.item];
        let (sums, parts) = self.convert(item, &block.rows)?;
        let mut hash = Sha256::new();
        for ((name, range), bytes) in item.places(&block.rows).into_iter().zip(&parts) {
            if bytes.len() != range.len() {
                return Err(tensor_error(&name, format!("{} bytes, planned {}", bytes.len(), range.len())));
            }
            shards.write(&name, range.start, bytes)?;
            hash.update(bytes);
        }
        self.progress.advance((item.info.bytes as u64 * block.rows.len() as u64) / item.units().max(1) as u64);
        Ok((sums, hash.finalize().into()))
    }

    fn convert(&self, item: &Item, rows: &Range<usize>) -> Result<(Sums, Vec<Vec<u8>>)> {
        let name = &item.info.name;
        let (_, cols) = item.info.rows_cols();
        if let Work::Copy = item.work {
            let bytes = self.source.bytes(name)?;
            let bytes = &bytes[rows.clone()];
            refuse_non_finite_bytes(&item.info, bytes, rows.start)?;
            return Ok((Sums::default(), vec![bytes.to_vec()]));
        }
        let mut values = Vec::new();
        self.source.read_rows_f32(name, rows.clone(), &mut values)?;
        refuse_non_finite(name, &values, rows.start, cols)?;
        match &item.work {
            Work::Copy => Ok((Sums::default(), Vec::new())),
            Work::Floats(dtype) => Ok((Sums::default(), vec![encode_f32(name, &values, *dtype)?])),
            Work::Quantize(how) => {
                let tensor = (how.quantizer)(name, [rows.len(), cols], &values)?;
                let sums = Sums::of(&tensor, &values);
                let parts = native::encode(name, &tensor)?;
                Ok((sums, parts.into_iter().map(|p| p.bytes).collect()))
            }
        }
    }

    /// Reads everything again: files for their hashes, and tensors to see that they decode.
    fn manifest(
        &self,
        output: &OutputDir,
        layout: &Layout,
        sidecars: &[Sidecar],
        tensors: &[TensorRecord],
    ) -> Result<Manifest> {
        let mut names: Vec<PathBuf> = layout.files().map(PathBuf::from).collect();
        names.extend(layout.index().map(|_| PathBuf::from(crate::format::safetensors::INDEX)));
        names.extend(sidecars.iter().map(|s| s.1.clone()));
        names.extend(self.options.extra.iter().map(|e| e.0.clone()));
        let length = |name: &PathBuf| output.partial().join(name).metadata().map_or(0, |m| m.len());
        let (hashed, decoded) = (names.iter().map(length).sum::<u64>(), tensors.iter().map(|t| t.bytes).sum::<u64>());
        self.progress.start(Stage::Verify, tensors.len(), hashed + decoded);
        let advance = |bytes: u64| {
            self.progress.advance(bytes);
            !self.stopped()
        };
        let record = |name: &PathBuf| {
            let record = FileRecord::of(&output.partial().join(name), &advance)?;
            Ok((name.to_string_lossy().into_owned(), record))
        };
        let (files, decoded) = rayon::join(
            || names.par_iter().map(record).collect::<Result<BTreeMap<_, _>>>(),
            || verify::tensors(output.partial(), Some(tensors), self.progress, self.options.stop),
        );
        decoded?;
        let name = self.source.path().canonicalize().ok();
        let name = name.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        Ok(Manifest {
            manifest: 1,
            nibble: env!("CARGO_PKG_VERSION").to_owned(),
            made_by: self.made.by.to_owned(),
            source: SourceRecord { name, fingerprint: self.source_fingerprint() },
            recipe: self.made.recipe.clone(),
            seed: self.made.seed,
            files: files?,
            tensors: tensors.to_vec(),
        })
    }

    /// Names, types, shapes and sizes of all tensors: what the headers say.
    fn source_fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for info in self.source.infos() {
            hash.update(format!("{}\0{}\0{:?}\0{}\n", info.name, info.stored.name(), info.shape, info.bytes));
        }
        hex(&hash.finalize())
    }

    /// Everything that decides the output's bytes, as far as it can be known without reading them: headers, and length
    /// and time of change of the source's files, recipe, layout, version, seed.
    fn fingerprint(&self, layout: &Layout) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(env!("CARGO_PKG_VERSION"));
        hash.update(self.made.by);
        hash.update(self.made.seed.to_le_bytes());
        hash.update(&self.made.recipe);
        hash.update(self.source_fingerprint());
        for (path, len, changed) in crate::format::weight_stamps(self.source.path())? {
            hash.update(format!("{path}\0{len}\0{changed}\n"));
        }
        for item in self.items {
            hash.update(format!("{}\0{:?}\n", item.name, item.work));
        }
        layout.files().for_each(|f| hash.update(f));
        Ok(hex(&hash.finalize()))
    }
}

impl Item {
    /// What blocks are made of: rows, or bytes for a copy.
    fn units(&self) -> usize {
        match self.work {
            Work::Copy => self.info.bytes,
            _ => self.info.rows_cols().0,
        }
    }

    fn values(&self, rows: &Range<usize>) -> usize {
        match self.work {
            Work::Copy => rows.len(),
            _ => rows.len() * self.info.rows_cols().1,
        }
    }

    /// Values of the largest block.
    pub fn largest_block(&self) -> usize {
        self.blocks().iter().map(|b| self.values(b)).max().unwrap_or(0)
    }

    /// Blocks of rows, in order; one empty block for an empty tensor, so that it is finished too.
    fn blocks(&self) -> Vec<Range<usize>> {
        let units = self.units();
        let per_unit = self.values(&(0..1)).max(1);
        let step = match &self.work {
            Work::Quantize(Quantize { rows: Rows::Tied, .. }) => units,
            Work::Quantize(Quantize { rows: Rows::Shared, .. }) => SHARED_VALUES / per_unit,
            _ => BLOCK_VALUES / per_unit,
        };
        let step = step.max(1);
        (0..units.max(1)).step_by(step).map(|at| at.min(units)..(at + step).min(units)).collect()
    }

    /// Which bytes of which slots a block of rows becomes, in the order of its parts.
    fn places(&self, rows: &Range<usize>) -> Vec<(String, Range<usize>)> {
        let units = self.units();
        let place = |slot: &crate::format::shards::Slot| {
            let bytes = slot.bytes();
            // Parts that don't go by rows belong to tensors of one block.
            let row = bytes.checked_div(units).unwrap_or(0);
            let range = if rows.len() == units { 0..bytes } else { rows.start * row..rows.end * row };
            (slot.name.clone(), range)
        };
        self.bundle.slots.iter().map(place).collect()
    }
}

/// Refuses the first value that isn't finite, by its place: neither codes nor products come out of one.
pub(super) fn refuse_non_finite(name: &str, values: &[f32], first_row: usize, cols: usize) -> Result<()> {
    match first_where(values, |v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(not_finite(name, values[at], first_row * cols + at, cols)),
    }
}

/// The same for bytes of a tensor that is copied, from its byte `from` on.
fn refuse_non_finite_bytes(info: &TensorInfo, bytes: &[u8], from: usize) -> Result<()> {
    let Stored::Plain(dtype) = info.stored else { return Ok(()) };
    let Some(at) = first_non_finite(dtype, bytes) else { return Ok(()) };
    let size = dtype.bitsize() / 8;
    let one = TensorInfo { shape: vec![1], bytes: size, ..info.clone() };
    let mut value = Vec::new();
    decode_rows(&one, &bytes[at * size..(at + 1) * size], 0..1, &mut value)?;
    Err(not_finite(&info.name, value[0], from / size + at, info.rows_cols().1))
}

fn not_finite(name: &str, value: f32, at: usize, cols: usize) -> QuantError {
    let (row, col) = (at / cols.max(1), at % cols.max(1));
    tensor_error(name, format!("value {value} at row {row}, column {col}, wanted finite ones"))
}

/// How many blocks of these many values are done at the same time, from the first one on: as many as together have no more
/// than [`WINDOW_VALUES`], or the one that alone has more.
pub(super) fn window(values: impl Iterator<Item = usize>) -> usize {
    let fits = |sum: &mut usize, values: usize| {
        *sum += values;
        (*sum <= WINDOW_VALUES).then_some(())
    };
    values.scan(0, fits).count().max(1)
}

fn sidecar_bytes(sidecars: &[Sidecar]) -> u64 {
    sidecars.iter().filter_map(|s| s.0.metadata().ok()).map(|m| m.len()).sum()
}
