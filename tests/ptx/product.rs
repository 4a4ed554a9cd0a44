//! Products that four warps start together and that run on while the warps do: `wgmma`. Each warp has 16 of the 64 rows to
//! itself, so warps are run one after another.
//!
//! A product reads its registers and shared memory at any time until somebody has waited for it: whoever writes there
//! before, or reads a sum, is refused. Registers that other instructions wrote count only after a fence, shared memory that
//! threads wrote only after it was shown.

use super::alu::{self, Lanes};
use super::parse::{Instruction, Kernel, Op, Operand};
use super::run::{Block, Warp, who};

/// Descriptors that are known: rows of 128 bytes, swizzled, eight of them 1024 bytes apart.
const LAYOUT: u64 = 1 << 62 | (1024 >> 4) << 32 | 1 << 16;
/// Bits of an address, in 16 bytes.
const PLACE: u64 = 0x3fff;

/// One warp's products.
pub struct Products {
    /// Whether the kernel has any: others aren't slowed down.
    is_used: bool,
    /// For each register: how many products that run read or write it.
    read: Vec<u32>,
    written: Vec<u32>,
    /// Whether other instructions wrote it since the last fence.
    is_new: Vec<bool>,
    started: usize,
    /// Groups that run, oldest first; the last one is open.
    groups: Vec<Vec<Running>>,
}

struct Running {
    sums: Vec<usize>,
    factors: Vec<usize>,
    /// (address in shared memory, mark)
    places: Vec<(u64, u64)>,
}

impl Products {
    pub fn of(kernel: &Kernel) -> Products {
        let is_used = kernel.code.iter().any(|it| matches!(it.op, Op::Wgmma(_)));
        let registers = if is_used { kernel.registers } else { 0 };
        Products {
            is_used,
            read: vec![0; registers],
            written: vec![0; registers],
            is_new: vec![true; registers],
            started: 0,
            groups: vec![Vec::new()],
        }
    }

    /// Whether another warp of the group has started as many.
    pub fn is_like(&self, other: &Products) -> bool {
        self.started == other.started
    }

    pub fn are_running(&self) -> bool {
        self.groups.iter().any(|group| !group.is_empty())
    }

    /// Whether an instruction leaves alone what products use.
    pub fn check(&mut self, it: &Instruction) -> Result<(), String> {
        if !self.is_used || matches!(it.op, Op::Wgmma(_)) {
            return Ok(());
        }
        let reads =
            it.from.iter().filter_map(|operand| if let Operand::Register(r) = operand { Some(*r) } else { None });
        if reads.chain(it.guard.map(|(register, _)| register)).any(|register| self.written[register] > 0) {
            return Err("reads a sum of a product that runs".to_string());
        }
        for register in &it.to {
            if self.written[*register] > 0 || self.read[*register] > 0 {
                return Err("writes a register of a product that runs".to_string());
            }
            self.is_new[*register] = true;
        }
        Ok(())
    }

    /// Everything written so far counts.
    pub fn begin(&mut self) {
        self.is_new.fill(false);
    }

    pub fn commit(&mut self) {
        self.groups.push(Vec::new());
    }

    /// `values` are the four registers of the first factor, the descriptor, whether sums are added to, and three that are
    /// always 1, 1 and 0.
    pub fn start(
        block: &mut Block,
        warp: &mut Warp,
        it: &Instruction,
        columns: usize,
        values: &[Lanes],
    ) -> Result<(), String> {
        let [a0, a1, a2, a3, descriptor, adds, one, same, zero] = values else { return Err("a product's form".into()) };
        if it.to.len() != columns / 2 || (one[0], same[0], zero[0]) != (1, 1, 0) {
            return Err("only plain products are known".to_string());
        }
        let factors: Vec<usize> =
            it.from[..4].iter().filter_map(|o| if let Operand::Register(r) = o { Some(*r) } else { None }).collect();
        let products = &mut warp.products;
        if factors.iter().chain(&it.to).any(|register| products.is_new[*register]) {
            return Err("registers were written since the last wgmma.fence".to_string());
        }
        if factors.iter().any(|register| products.written[*register] > 0) {
            return Err("multiplies with a sum of a product that runs".to_string());
        }
        let descriptor = descriptor[0];
        if descriptor & !PLACE != LAYOUT {
            return Err(format!("descriptor {descriptor:#x} is not known"));
        }
        let base = (descriptor & PLACE) << 4;
        let mut places = Vec::new();
        let reader = who(block, warp, 0);
        let mut pair = |column: usize, k: usize| -> Result<u64, String> {
            let plain = base + (column / 8 * 1024 + column % 8 * 128 + k * 2) as u64;
            let at = plain ^ (plain >> 7 & 7) << 4;
            let (value, mark) = block.shared.read_by_product(reader, at, &block.shown)?;
            places.push((at, mark));
            Ok(value)
        };
        for block_of_8 in 0..columns / 8 {
            let (mut b0, mut b1) = ([0; 32], [0; 32]);
            for lane in 0..32 {
                let (column, k) = (block_of_8 * 8 + lane / 4, lane % 4 * 2);
                (b0[lane], b1[lane]) = (pair(column, k)?, pair(column, k + 8)?);
            }
            let to = &it.to[block_of_8 * 4..][..4];
            let nothing = [0; 32];
            let c = std::array::from_fn(|e| if adds[0] == 0 { &nothing } else { &warp.registers[to[e]] });
            let d = alu::mma([a0, a1, a2, a3], [&b0, &b1], c);
            to.iter().zip(d).for_each(|(register, lanes)| warp.registers[*register] = lanes);
        }
        let products = &mut warp.products;
        factors.iter().for_each(|register| products.read[*register] += 1);
        it.to.iter().for_each(|register| products.written[*register] += 1);
        products.started += 1;
        let running = Running { sums: it.to.clone(), factors, places };
        products.groups.last_mut().ok_or("no open group")?.push(running);
        Ok(())
    }

    /// Waits until at most so many groups run.
    pub fn wait(block: &mut Block, warp: &mut Warp, groups: usize) -> Result<(), String> {
        let reader = who(block, warp, 0);
        let done = warp.products.groups.len().saturating_sub(1 + groups);
        let products = &mut warp.products;
        for running in products.groups.drain(..done).flatten() {
            running.factors.iter().for_each(|register| products.read[*register] -= 1);
            running.sums.iter().for_each(|register| products.written[*register] -= 1);
            // It read until now: reading again is what a write must not race with.
            for (at, mark) in running.places {
                if block.shared.read_by_product(reader, at, &block.shown)?.1 != mark {
                    return Err(format!("shared memory changed while a product read it (byte {at})"));
                }
            }
        }
        Ok(())
    }
}
