//! Runs one launch, block after block. The lanes of a warp that stand at the same instruction go together, those furthest
//! behind first, so that branches meet again; a warp runs until a barrier stops it.

use super::alu::{self, Lanes};
use super::memory::{LAUNCH, Memory, Who};
use super::parse::{Instruction, Kernel, Op, Operand, Space, Special};
use super::product::Products;
use std::collections::BTreeSet;

/// Where shared memory begins among generic addresses; global memory lies below.
pub const SHARED_WINDOW: u64 = 1 << 60;
/// Allocation n begins at (n + 1) << ALLOCATION.
pub const ALLOCATION: u32 = 36;
/// Instructions that one warp may execute before it counts as hanging.
const PATIENCE: u64 = 50_000_000;

/// What a launch cost, in units that don't depend on time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Instructions executed by warps.
    pub instructions: u64,
    /// Sectors of 32 bytes that global accesses touched, each access of a warp on its own.
    pub sectors: u64,
    /// The least that the same bytes fit into.
    pub least_sectors: u64,
    /// Passes over the banks that shared accesses took.
    pub wavefronts: u64,
    /// The least that the same accesses could take.
    pub least_wavefronts: u64,
}

impl Counters {
    /// Adds another launch's.
    pub fn add(&mut self, other: &Counters) {
        self.instructions += other.instructions;
        self.sectors += other.sectors;
        self.least_sectors += other.least_sectors;
        self.wavefronts += other.wavefronts;
        self.least_wavefronts += other.least_wavefronts;
    }
}

/// One launch.
pub struct Run<'a> {
    pub kernel: &'a Kernel,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
    pub params: &'a [u8],
    pub memory: &'a mut [Memory],
    pub launch: u64,
    pub counters: Counters,
}

struct Copy {
    to: u64,
    bytes: [u8; 16],
}

pub(super) struct Warp {
    pub(super) first_thread: u32,
    pub(super) registers: Vec<Lanes>,
    /// (place, lanes) ascending by place: lanes that go together.
    groups: Vec<(usize, u32)>,
    waits: bool,
    /// Times that its lanes met since the block's last barrier.
    meetings: u32,
    executed: u64,
    /// A thread's copies: groups that are closed, oldest first, then the open one.
    copies: Vec<Vec<Vec<Copy>>>,
    pub(super) products: Products,
}

pub(super) struct Block {
    index: [u32; 3],
    number: u64,
    pub(super) shared: Memory,
    epoch: u32,
    /// Times that a thread showed what it wrote to products, and that count at each thread's last time.
    shows: u32,
    pub(super) shown: Vec<u32>,
}

impl Run<'_> {
    /// Runs all blocks, or says which thread did what at which line.
    pub fn run(&mut self) -> Result<(), String> {
        let [x, y, z] = self.grid;
        for number in 0..u64::from(x) * u64::from(y) * u64::from(z) {
            let (xs, ys) = (u64::from(x), u64::from(y));
            let index = [(number % xs) as u32, (number / xs % ys) as u32, (number / xs / ys) as u32];
            self.block(index, self.launch * LAUNCH + number)?;
        }
        Ok(())
    }

    fn block(&mut self, index: [u32; 3], number: u64) -> Result<(), String> {
        let shared = Memory::new(self.kernel.shared + self.shared as usize);
        let mut block = Block {
            index,
            number,
            shared,
            epoch: 0,
            shows: 1,
            shown: vec![0; self.threads.next_multiple_of(32) as usize],
        };
        let mut warps: Vec<Warp> = (0..self.threads.div_ceil(32))
            .map(|warp| {
                let lanes = (self.threads - warp * 32).min(32);
                let mask = if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
                Warp {
                    first_thread: warp * 32,
                    registers: vec![[0xdead_beef_dead_beef; 32]; self.kernel.registers],
                    groups: vec![(0, mask)],
                    waits: false,
                    meetings: 0,
                    executed: 0,
                    copies: (0..32).map(|_| vec![Vec::new()]).collect(),
                    products: Products::of(self.kernel),
                }
            })
            .collect();
        loop {
            for warp in &mut warps {
                while !warp.waits && !warp.groups.is_empty() {
                    self.step(&mut block, warp)?;
                }
            }
            if warps.chunks(4).any(|group| group.iter().any(|warp| !warp.products.is_like(&group[0].products))) {
                return Err(format!(
                    "{}: block {index:?}: warps of a group differ in their products",
                    self.kernel.name
                ));
            }
            if warps.iter().all(|warp| warp.groups.is_empty()) {
                break;
            }
            // Every warp is at a barrier or has left.
            warps.iter_mut().for_each(|warp| (warp.waits, warp.meetings) = (false, 0));
            block.epoch += 1;
        }
        if warps.iter().any(|warp| warp.copies.iter().any(|groups| groups.iter().any(|group| !group.is_empty()))) {
            return Err(format!("{}: block {index:?} ends with copies in flight", self.kernel.name));
        }
        if warps.iter().any(|warp| warp.products.are_running()) {
            return Err(format!("{}: block {index:?} ends with products running", self.kernel.name));
        }
        Ok(())
    }

    fn step(&mut self, block: &mut Block, warp: &mut Warp) -> Result<(), String> {
        let (place, lanes) = warp.groups[0];
        let kernel = self.kernel;
        let Some(instruction) = kernel.code.get(place) else {
            return Err(format!("{}: runs past its end", kernel.name));
        };
        warp.executed += 1;
        self.counters.instructions += 1;
        if warp.executed > PATIENCE {
            return Err(format!("{}: line {}: still running", kernel.name, instruction.line));
        }
        let active = match instruction.guard {
            None => lanes,
            Some((register, negated)) => {
                let truth = (0..32).fold(0, |m, i| m | ((warp.registers[register][i] as u32 & 1) << i));
                lanes & if negated { !truth } else { truth }
            }
        };
        let next = match instruction.op {
            Op::Branch(target) => vec![(target, active), (place + 1, lanes & !active)],
            Op::Return => vec![(place + 1, lanes & !active)],
            _ => {
                let result = self.execute(block, warp, instruction, active);
                result.map_err(|why| {
                    let (name, line) = (&kernel.name, instruction.line);
                    format!("{name}, line {line}, block {:?}, warp {}: {why}", block.index, warp.first_thread / 32)
                })?;
                // The common case: everybody goes on together.
                let meets = warp.groups.get(1).is_some_and(|(other, _)| *other <= place + 1);
                if !meets {
                    warp.groups[0].0 += 1;
                    return Ok(());
                }
                vec![(place + 1, lanes)]
            }
        };
        warp.groups.remove(0);
        for (place, lanes) in next.into_iter().filter(|(_, lanes)| *lanes != 0) {
            match warp.groups.binary_search_by_key(&place, |(place, _)| *place) {
                Ok(at) => warp.groups[at].1 |= lanes,
                Err(at) => warp.groups.insert(at, (place, lanes)),
            }
        }
        Ok(())
    }

    fn value(&self, block: &Block, warp: &Warp, operand: Operand) -> Lanes {
        match operand {
            Operand::Register(register) => warp.registers[register],
            Operand::Immediate(value) => [value; 32],
            Operand::Special(Special::Thread) => std::array::from_fn(|i| u64::from(warp.first_thread) + i as u64),
            Operand::Special(Special::Threads) => [self.threads.into(); 32],
            Operand::Special(Special::Block(axis)) => [block.index[axis].into(); 32],
        }
    }

    fn execute(&mut self, block: &mut Block, warp: &mut Warp, it: &Instruction, active: u32) -> Result<(), String> {
        let unknown = || format!("{:?} is not known", it.op);
        warp.products.check(it)?;
        let from = |n: usize| -> Result<Lanes, String> {
            it.from.get(n).map(|operand| self.value(block, warp, *operand)).ok_or_else(unknown)
        };
        let result = match it.op {
            Op::Unary(op, ty) => alu::unary(op, ty, &from(0)?).ok_or_else(unknown)?,
            Op::Binary(op, ty) => alu::binary(op, ty, &from(0)?, &from(1)?).ok_or_else(unknown)?,
            Op::Mad(ty) | Op::Fma(ty) => alu::multiply_add(ty, &from(0)?, &from(1)?, &from(2)?).ok_or_else(unknown)?,
            Op::Lop3 => alu::lop3(&from(0)?, &from(1)?, &from(2)?, from(3)?[0]),
            Op::Prmt => alu::prmt(&from(0)?, &from(1)?, &from(2)?),
            Op::Bfi => {
                let (a, b, start, len) = (from(0)?, from(1)?, from(2)?, from(3)?);
                std::array::from_fn(|i| alu::bit_insert(a[i], b[i], start[i], len[i]))
            }
            Op::Select(_) => {
                let (a, b, choice) = (from(0)?, from(1)?, from(2)?);
                std::array::from_fn(|i| if choice[i] & 1 == 1 { a[i] } else { b[i] })
            }
            Op::Compare(op, ty) => alu::compare(op, ty, &from(0)?, &from(1)?),
            Op::Convert { to, from: ty, nearest_int } => alu::convert(to, ty, nearest_int, &from(0)?),
            Op::PackHalves => alu::pack_halves(&from(0)?, &from(1)?),
            Op::SharedToGeneric => from(0)?.map(|a| a + SHARED_WINDOW),
            Op::GenericToShared => from(0)?.map(|a| a.wrapping_sub(SHARED_WINDOW)),
            Op::ShuffleXor => {
                whole(active)?;
                let (a, mask) = (from(0)?, from(1)?);
                std::array::from_fn(|i| a[i ^ (mask[i] as usize & 31)])
            }
            Op::Mma => {
                whole(active)?;
                let values = (0..10).map(from).collect::<Result<Vec<_>, _>>()?;
                let (a, b, c) = (&values[..4], &values[4..6], &values[6..]);
                let d = alu::mma([&a[0], &a[1], &a[2], &a[3]], [&b[0], &b[1]], [&c[0], &c[1], &c[2], &c[3]]);
                for (register, lanes) in it.to.iter().zip(d) {
                    warp.registers[*register] = lanes;
                }
                return Ok(());
            }
            Op::Load(..) | Op::Store(..) => return self.access(block, warp, it, active),
            Op::CopyAsync => return self.copy(block, warp, it, active),
            Op::CopyCommit => {
                for lane in lanes_of(active) {
                    warp.copies[lane].push(Vec::new());
                }
                return Ok(());
            }
            Op::CopyWait(groups) => {
                for lane in lanes_of(active) {
                    let who = who(block, warp, lane);
                    let done = warp.copies[lane].len().saturating_sub(1 + groups);
                    for copy in warp.copies[lane].drain(..done).flatten() {
                        block.shared.arrive(who, copy.to, copy.bytes);
                    }
                }
                return Ok(());
            }
            Op::WarpBarrier => {
                whole(active)?;
                warp.meetings += 1;
                return Ok(());
            }
            Op::Barrier => {
                if warp.groups.len() > 1 {
                    return Err("a barrier that only part of the warp has reached".to_string());
                }
                warp.waits = true;
                return Ok(());
            }
            Op::Wgmma(columns) => {
                whole(active)?;
                let values = it.from.iter().map(|operand| self.value(block, warp, *operand));
                let values: Vec<Lanes> = values.collect();
                return Products::start(block, warp, it, columns, &values);
            }
            Op::WgmmaBegin => {
                whole(active)?;
                warp.products.begin();
                return Ok(());
            }
            Op::WgmmaCommit => {
                whole(active)?;
                warp.products.commit();
                return Ok(());
            }
            Op::WgmmaWait(groups) => {
                whole(active)?;
                return Products::wait(block, warp, groups);
            }
            Op::ShowToProducts => {
                block.shows += 1;
                for lane in lanes_of(active) {
                    block.shown[warp.first_thread as usize + lane] = block.shows;
                }
                return Ok(());
            }
            Op::Branch(_) | Op::Return => return Ok(()),
        };
        let to = &mut warp.registers[*it.to.first().ok_or_else(unknown)?];
        if active == u32::MAX {
            *to = result;
        } else {
            lanes_of(active).for_each(|lane| to[lane] = result[lane]);
        }
        Ok(())
    }

    fn access(&mut self, block: &mut Block, warp: &mut Warp, it: &Instruction, active: u32) -> Result<(), String> {
        let (space, ty, loads) = match it.op {
            Op::Load(space, ty) => (space, ty, true),
            Op::Store(space, ty) => (space, ty, false),
            _ => return Err("no access".to_string()),
        };
        let parts = if loads { it.to.len() } else { it.from.len() - 1 };
        let (width, base) = (ty.bytes(), self.value(block, warp, it.from[0]));
        let addresses: Lanes = base.map(|a| a.wrapping_add(it.offset as u64));
        if space == Space::Param {
            for lane in lanes_of(active) {
                for (part, register) in it.to.iter().enumerate() {
                    let at = addresses[lane] as usize + part * width;
                    let bytes = self.params.get(at..at + width).ok_or("reads past the parameter")?;
                    let mut number = [0; 8];
                    number[..width].copy_from_slice(bytes);
                    warp.registers[*register][lane] = u64::from_le_bytes(number);
                }
            }
            return Ok(());
        }
        let first = active.trailing_zeros() as usize;
        let is_shared = match space {
            Space::Shared => true,
            Space::Global => false,
            _ => addresses.get(first).is_some_and(|a| *a >= SHARED_WINDOW),
        };
        let values: Vec<Lanes> = match loads {
            true => Vec::new(),
            false => it.from[1..].iter().map(|operand| self.value(block, warp, *operand)).collect(),
        };
        self.count(is_shared, &addresses, width * parts, active);
        for lane in lanes_of(active) {
            let who = who(block, warp, lane);
            let address = addresses[lane];
            let (memory, at) = match (is_shared, space) {
                (true, Space::Shared) => (&mut block.shared, address),
                (true, _) => (&mut block.shared, address.wrapping_sub(SHARED_WINDOW)),
                (false, _) => global(self.memory, address)?,
            };
            let fault = |why| format!("thread {}: {why}", who.thread);
            memory.check(at, width * parts).map_err(fault)?;
            for part in 0..parts {
                let at = at + (part * width) as u64;
                if loads {
                    warp.registers[it.to[part]][lane] = memory.read(who, at, width).map_err(fault)?;
                } else {
                    memory.write(who, at, width, values[part][lane]).map_err(fault)?;
                }
            }
        }
        Ok(())
    }

    fn copy(&mut self, block: &mut Block, warp: &mut Warp, it: &Instruction, active: u32) -> Result<(), String> {
        let [to, from, bytes, taken] = [0, 1, 2, 3].map(|n| it.from.get(n).copied());
        let (Some(to), Some(from), Some(Operand::Immediate(16)), Some(taken)) = (to, from, bytes, taken) else {
            return Err("only copies of 16 bytes are known".to_string());
        };
        let [to, from, taken] = [to, from, taken].map(|operand| self.value(block, warp, operand));
        let reading = lanes_of(active).filter(|lane| taken[*lane] > 0).fold(0, |mask, lane| mask | 1 << lane);
        self.count(true, &to, 16, active);
        self.count(false, &from, 16, reading);
        for lane in lanes_of(active) {
            let who = who(block, warp, lane);
            let fault = |why| format!("thread {}: {why}", who.thread);
            let mut data = [0; 16];
            if taken[lane] > 0 {
                let (memory, at) = global(self.memory, from[lane])?;
                memory.check(at, 16).map_err(fault)?;
                let halves = [memory.read(who, at, 8), memory.read(who, at + 8, 8)];
                for (half, data) in halves.into_iter().zip(data.chunks_exact_mut(8)) {
                    data.copy_from_slice(&half.map_err(fault)?.to_le_bytes());
                }
            }
            block.shared.expect(who, to[lane]).map_err(fault)?;
            let copy = Copy { to: to[lane], bytes: data };
            warp.copies[lane].last_mut().ok_or("no open group")?.push(copy);
        }
        Ok(())
    }

    /// Counts an access of a warp. Shared memory has 32 banks of 4 bytes; accesses of 8 and 16 bytes go in halves and
    /// quarters of a warp.
    fn count(&mut self, is_shared: bool, addresses: &Lanes, width: usize, active: u32) {
        if active == 0 {
            return;
        }
        if !is_shared {
            let mut sectors: Vec<u64> = lanes_of(active)
                .flat_map(|lane| addresses[lane] / 32..(addresses[lane] + width as u64).div_ceil(32))
                .collect();
            sectors.sort_unstable();
            sectors.dedup();
            let bytes: BTreeSet<u64> = lanes_of(active).map(|lane| addresses[lane]).collect();
            self.counters.sectors += sectors.len() as u64;
            self.counters.least_sectors += (bytes.len() * width).div_ceil(32) as u64;
            return;
        }
        let together = 32 / (width / 4).max(1);
        for first in (0..32).step_by(together) {
            let mut words: Vec<u64> = (first..first + together)
                .filter(|lane| active >> lane & 1 == 1)
                .flat_map(|lane| addresses[lane] / 4..(addresses[lane] + width as u64).div_ceil(4))
                .collect();
            words.sort_unstable();
            words.dedup();
            if words.is_empty() {
                continue;
            }
            let mut banks = [0; 32];
            words.iter().for_each(|word| banks[*word as usize % 32] += 1);
            self.counters.wavefronts += banks.iter().max().copied().unwrap_or(0);
            self.counters.least_wavefronts += words.len().div_ceil(32) as u64;
        }
    }
}

pub(super) fn who(block: &Block, warp: &Warp, lane: usize) -> Who {
    let thread = warp.first_thread + lane as u32;
    Who { block: block.number, thread, epoch: block.epoch, meetings: warp.meetings, shows: block.shows }
}

fn global(memory: &mut [Memory], address: u64) -> Result<(&mut Memory, u64), String> {
    let index = (address >> ALLOCATION).wrapping_sub(1);
    match memory.get_mut(usize::try_from(index).unwrap_or(usize::MAX)) {
        Some(memory) => Ok((memory, address & ((1 << ALLOCATION) - 1))),
        None => Err(format!("address {address:#x} is nobody's")),
    }
}

fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

fn whole(active: u32) -> Result<(), String> {
    if active == u32::MAX { Ok(()) } else { Err(format!("only lanes {active:#x} of a warp that is wanted whole")) }
}
