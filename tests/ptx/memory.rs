//! Memory that knows who touched it: reads of what nobody wrote, accesses out of place and races are errors.
//!
//! Two accesses of different threads to the same bytes race if one of them writes and no barrier of their block lies
//! between them, nor, in one warp, a meeting of its lanes; threads of different blocks of a launch never have one. A copy in flight belongs to nobody until the
//! thread that started it has waited for it, and to others only after a barrier. Bytes are watched in pairs.

/// Bytes that are watched together.
const GRAIN: usize = 2;
/// Readers of more than one warp.
const MANY: u32 = u32::MAX;
/// Added to a warp's first thread: several of its threads read.
const SEVERAL: u32 = 1 << 31;

/// Who accesses: a block and thread of a launch, and how many barriers the block has passed.
#[derive(Debug, Clone, Copy)]
pub struct Who {
    /// Block of the launch, counted through all axes; launches don't share numbers.
    pub block: u64,
    /// Thread of the block.
    pub thread: u32,
    /// Barriers behind it.
    pub epoch: u32,
    /// Meetings of its warp since the last barrier.
    pub meetings: u32,
    /// Times that a thread of the block has shown what it wrote to products of warp groups.
    pub shows: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Unwritten,
    Written,
    InFlight,
}

/// What is known of two bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    state: State,
    writer: u32,
    writer_epoch: u32,
    writer_meetings: u32,
    reader: u32,
    reader_epoch: u32,
    reader_meetings: u32,
    writer_shows: u32,
    writer_block: u64,
    reader_block: u64,
}

/// A piece of memory.
#[derive(Debug, Default)]
pub struct Memory {
    bytes: Vec<u8>,
    cells: Vec<Cell>,
}

/// What is wrong with an access.
pub type Fault = String;

impl Memory {
    /// `len` bytes that nobody has written; they hold what floats and pointers choke on.
    pub fn new(len: usize) -> Memory {
        Memory { bytes: vec![0xff; len], cells: vec![Cell::default(); len.div_ceil(GRAIN)] }
    }

    /// The host writes: everything before is done with.
    pub fn host_write(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let cell = Cell { state: State::Written, writer_block: u64::MAX, ..Cell::default() };
        self.cells[at / GRAIN..(at + bytes.len()).div_ceil(GRAIN)].fill(cell);
    }

    /// The host reads; a fault if part of it was never written.
    pub fn host_read(&self, at: usize, out: &mut [u8]) -> Result<(), Fault> {
        let cells = &self.cells[at / GRAIN..(at + out.len()).div_ceil(GRAIN)];
        if let Some(place) = cells.iter().position(|cell| cell.state != State::Written) {
            return Err(format!("the host reads byte {}, which nobody wrote", at + place * GRAIN));
        }
        out.copy_from_slice(&self.bytes[at..at + out.len()]);
        Ok(())
    }

    fn place(&self, at: u64, len: usize) -> Result<usize, Fault> {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if at.checked_add(len).is_none_or(|end| end > self.bytes.len()) {
            return Err(format!("{len} bytes at {at} of {} bytes", self.bytes.len()));
        }
        if !at.is_multiple_of(len) {
            return Err(format!("{len} bytes at {at}, which is not aligned to them"));
        }
        Ok(at)
    }

    fn cells(&mut self, at: usize, len: usize) -> &mut [Cell] {
        &mut self.cells[at / GRAIN..(at + len).div_ceil(GRAIN)]
    }

    /// Up to 8 bytes as a number; `whole` is how many the access has, which it must be aligned to.
    pub fn read(&mut self, who: Who, at: u64, len: usize) -> Result<u64, Fault> {
        let at = self.place(at, len)?;
        for cell in self.cells(at, len) {
            cell.read(who).map_err(|why| format!("{why} (byte {at})"))?;
        }
        let mut number = [0; 8];
        number[..len].copy_from_slice(&self.bytes[at..at + len]);
        Ok(u64::from_le_bytes(number))
    }

    /// As [`Memory::read`], by a product of a warp group, which sees what a thread wrote only once it was shown: `shown` has
    /// the block's shows at each thread's last one. With it, a mark that changes when somebody writes there.
    pub fn read_by_product(&mut self, who: Who, at: u64, shown: &[u32]) -> Result<(u64, u64), Fault> {
        let value = self.read(who, at, 4)?;
        let mut mark = 0;
        for cell in self.cells(at as usize, 4) {
            if shown.get(cell.writer as usize).is_none_or(|shown| *shown <= cell.writer_shows) {
                return Err(format!("a product reads what was not shown to it (byte {at})"));
            }
            mark += u64::from(cell.writer_shows) << 32 | u64::from(cell.writer_epoch);
        }
        Ok((value, mark))
    }

    /// The low `len` bytes of a number.
    pub fn write(&mut self, who: Who, at: u64, len: usize, value: u64) -> Result<(), Fault> {
        let at = self.place(at, len)?;
        for cell in self.cells(at, len) {
            cell.write(who, State::Written).map_err(|why| format!("{why} (byte {at})"))?;
        }
        self.bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        Ok(())
    }

    /// Whether an access of `len` bytes is in place and aligned to its whole length.
    pub fn check(&self, at: u64, len: usize) -> Result<(), Fault> {
        self.place(at, len).map(|_| ())
    }

    /// 16 bytes start on their way here.
    pub fn expect(&mut self, who: Who, at: u64) -> Result<(), Fault> {
        let at = self.place(at, 16)?;
        for cell in self.cells(at, 16) {
            cell.write(who, State::InFlight).map_err(|why| format!("{why} (byte {at})"))?;
        }
        self.bytes[at..at + 16].fill(0xff);
        Ok(())
    }

    /// 16 bytes have arrived, for the thread that waited.
    pub fn arrive(&mut self, who: Who, at: u64, bytes: [u8; 16]) {
        let at = at as usize;
        self.bytes[at..at + 16].copy_from_slice(&bytes);
        for cell in self.cells(at, 16) {
            cell.state = State::Written;
            cell.written_by(who);
        }
    }
}

impl Cell {
    fn read(&mut self, who: Who) -> Result<(), &'static str> {
        match self.state {
            State::Unwritten => return Err("reads what nobody wrote"),
            State::InFlight => return Err("reads a copy in flight"),
            State::Written => {}
        }
        // Blocks of a launch have numbers of their own; what earlier launches wrote is settled.
        let recent = self.writer_block / LAUNCH == who.block / LAUNCH;
        if recent && self.writer_block != who.block {
            return Err("reads what another block of the launch writes");
        }
        if recent && self.follows_write(who) {
            return Err("reads what another thread writes, with no barrier between");
        }
        let seen = self.reader_block / LAUNCH == who.block / LAUNCH;
        if seen && self.reader_block != who.block {
            self.reader_block = who.block / LAUNCH * LAUNCH + MANY_BLOCKS;
        } else {
            let again = seen && self.reader_epoch == who.epoch && self.reader != who.thread;
            self.reader = match again {
                false => who.thread,
                // The latest meeting counts: it is what a write has to come after.
                true if self.reader != MANY && self.reader % SEVERAL / 32 == who.thread / 32 => {
                    who.thread / 32 * 32 + SEVERAL
                }
                true => MANY,
            };
            (self.reader_block, self.reader_epoch, self.reader_meetings) = (who.block, who.epoch, who.meetings);
        }
        Ok(())
    }

    fn write(&mut self, who: Who, state: State) -> Result<(), &'static str> {
        if self.state == State::InFlight {
            return Err("writes where a copy is in flight");
        }
        let launch = who.block / LAUNCH;
        if self.writer_block / LAUNCH == launch && self.state == State::Written {
            if self.writer_block != who.block {
                return Err("writes what another block of the launch writes");
            }
            if self.follows_write(who) {
                return Err("writes what another thread writes, with no barrier between");
            }
        }
        if self.reader_block / LAUNCH == launch {
            if self.reader_block != who.block {
                return Err("writes what another block of the launch reads");
            }
            if self.follows_read(who) {
                return Err("writes what another thread reads, with no barrier between");
            }
        }
        self.state = state;
        self.written_by(who);
        Ok(())
    }

    fn written_by(&mut self, who: Who) {
        (self.writer, self.writer_block) = (who.thread, who.block);
        (self.writer_epoch, self.writer_meetings, self.writer_shows) = (who.epoch, who.meetings, who.shows);
    }

    /// Whether nothing lies between the last write and what `who` does.
    fn follows_write(&self, who: Who) -> bool {
        let met = self.writer / 32 == who.thread / 32 && self.writer_meetings < who.meetings;
        self.writer_epoch == who.epoch && self.writer != who.thread && !met
    }

    /// The same of the last reads.
    fn follows_read(&self, who: Who) -> bool {
        let of_warp = self.reader != MANY && self.reader % SEVERAL / 32 == who.thread / 32;
        let met = of_warp && self.reader_meetings < who.meetings;
        self.reader_epoch == who.epoch && self.reader != who.thread && !met
    }
}

/// Block numbers of one launch: launch * LAUNCH + block.
pub const LAUNCH: u64 = 1 << 32;
/// The block number that stands for several readers.
const MANY_BLOCKS: u64 = LAUNCH - 1;
