//! PTX text to instructions whose operands are resolved: registers are indices, symbols are addresses, labels are places.
//!
//! Only the forms that nibble's kernels are made of are known; anything else is refused with its line.

mod mnemonics;

use mnemonics::operation;
use std::collections::HashMap;

/// A module's entries.
#[derive(Debug, Default)]
pub struct Module {
    /// By name.
    pub kernels: HashMap<String, Kernel>,
}

/// One entry.
#[derive(Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Bytes of its parameter.
    pub params: usize,
    /// Most threads of a block.
    pub max_threads: u32,
    /// Bytes of shared memory that it declares; memory given at launch lies behind them.
    pub shared: usize,
    /// Registers of all classes.
    pub registers: usize,
    /// The code.
    pub code: Vec<Instruction>,
}

/// One instruction.
#[derive(Debug, Clone)]
pub struct Instruction {
    /// Predicate register, and whether it is negated.
    pub guard: Option<(usize, bool)>,
    /// What it does.
    pub op: Op,
    /// Registers that are written.
    pub to: Vec<usize>,
    /// What is read.
    pub from: Vec<Operand>,
    /// Offset of the address, if there is one.
    pub offset: i64,
    /// Line in the module.
    pub line: usize,
}

/// What an instruction reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operand {
    /// A register.
    Register(usize),
    /// A number, a symbol's address or a float's bits.
    Immediate(u64),
    /// Where the thread stands.
    Special(Special),
}

/// Special registers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Special {
    /// Thread of the block.
    Thread,
    /// Threads of a block.
    Threads,
    /// Block, along x, y, z.
    Block(usize),
}

/// How bits are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// Unsigned or plain bits of so many bytes.
    U(u8),
    /// Signed, of so many bytes.
    S(u8),
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Two halves.
    F16x2,
    /// True or false.
    Predicate,
}

impl Type {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Type::U(n) | Type::S(n) => n.into(),
            Type::F32 | Type::F16x2 => 4,
            Type::F16 => 2,
            Type::Predicate => 1,
        }
    }
}

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// The kernel's parameter.
    Param,
    /// The device's memory.
    Global,
    /// The block's memory.
    Shared,
    /// Either of the last two, by address.
    Generic,
}

/// Two operands to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    MulWide,
    MulHi,
    Div,
    Rem,
    Min,
    Max,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

/// One operand to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Unary {
    Mov,
    Not,
    Neg,
    Sqrt,
    Reciprocal,
    Exp2,
}

/// Comparisons; the unordered ones are true if an operand is NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    LtOrNan,
    LeOrNan,
    GtOrNan,
    GeOrNan,
    /// Neither is NaN.
    Numbers,
}

/// What an instruction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Unary(Unary, Type),
    Binary(Binary, Type),
    Mad(Type),
    Fma(Type),
    Lop3,
    Prmt,
    Bfi,
    Select(Type),
    Compare(Compare, Type),
    Convert {
        to: Type,
        from: Type,
        nearest_int: bool,
    },
    PackHalves,
    SharedToGeneric,
    GenericToShared,
    Load(Space, Type),
    Store(Space, Type),
    CopyAsync,
    CopyCommit,
    CopyWait(usize),
    Barrier,
    WarpBarrier,
    Branch(usize),
    Return,
    ShuffleXor,
    Mma,
    /// Products of a warp group: columns of the second factor.
    Wgmma(usize),
    WgmmaBegin,
    WgmmaCommit,
    WgmmaWait(usize),
    ShowToProducts,
}

/// Why a module can't be read.
pub type Refusal = String;

impl Module {
    /// Reads a module.
    pub fn parse(text: &str) -> Result<Module, Refusal> {
        let mut module = Module::default();
        let mut parser: Option<Parser> = None;
        let mut name = String::new();
        let (mut params, mut max_threads) = (0, 1024);
        let mut extern_shared = None;
        for (number, line) in text.lines().enumerate() {
            let line = line.split("//").next().unwrap_or("").trim();
            let number = number + 1;
            let refuse = |what: &str| Err(format!("line {number}: {what}: `{line}`"));
            if line.is_empty() || line.starts_with(".pragma") {
                continue;
            }
            let Some(open) = parser.as_mut() else {
                if let Some(rest) = line.strip_prefix(".visible .entry ") {
                    name = rest.trim_end_matches('(').to_string();
                } else if line.starts_with(".param") {
                    let Some(bytes) = bracketed(line) else { return refuse("a parameter that is no struct") };
                    params = bytes;
                } else if let Some(rest) = line.strip_prefix(".maxntid ") {
                    max_threads = rest.split(',').next().and_then(|n| n.trim().parse().ok()).unwrap_or(1024);
                } else if line.starts_with(".extern .shared") {
                    extern_shared = symbol(line).map(str::to_string);
                } else if line == "{" {
                    parser = Some(Parser::new(&name, extern_shared.clone()));
                } else if !(line.starts_with(".version")
                    || line.starts_with(".target")
                    || line.starts_with(".address_size")
                    || line.starts_with(".minnctapersm")
                    || line.starts_with(".global")
                    || line == ")")
                {
                    return refuse("unknown");
                }
                continue;
            };
            if line == "}" {
                let kernel = parser.take().map(|p| p.finish(&name, params, max_threads));
                let Some(kernel) = kernel else { return refuse("unknown") };
                module.kernels.insert(name.clone(), kernel?);
                (params, max_threads) = (0, 1024);
            } else if let Err(why) = open.line(line, number) {
                return refuse(&why);
            }
        }
        Ok(module)
    }
}

/// `name[123]` -> 123.
fn bracketed(line: &str) -> Option<usize> {
    line.split_once('[')?.1.split_once(']')?.0.parse().ok()
}

/// `.. name[..` -> name.
fn symbol(line: &str) -> Option<&str> {
    line.split_once('[')?.0.split_whitespace().last()
}

struct Parser {
    param: String,
    /// Register classes: name, first index.
    classes: Vec<(String, usize)>,
    registers: usize,
    shared: usize,
    symbols: HashMap<String, usize>,
    extern_shared: Option<String>,
    labels: HashMap<String, usize>,
    code: Vec<Instruction>,
    branches: Vec<(usize, String)>,
}

impl Parser {
    fn new(name: &str, extern_shared: Option<String>) -> Parser {
        Parser {
            param: format!("{name}_param_0"),
            classes: Vec::new(),
            registers: 0,
            shared: 0,
            symbols: HashMap::new(),
            extern_shared,
            labels: HashMap::new(),
            code: Vec::new(),
            branches: Vec::new(),
        }
    }

    fn finish(mut self, name: &str, params: usize, max_threads: u32) -> Result<Kernel, Refusal> {
        for (at, label) in &self.branches {
            let Some(place) = self.labels.get(label) else { return Err(format!("no label {label}")) };
            self.code[*at].op = Op::Branch(*place);
        }
        let (shared, registers, code) = (self.shared, self.registers, self.code);
        Ok(Kernel { name: name.to_string(), params, max_threads, shared, registers, code })
    }

    fn line(&mut self, line: &str, number: usize) -> Result<(), Refusal> {
        if let Some(label) = line.strip_suffix(':') {
            self.labels.insert(label.to_string(), self.code.len());
            return Ok(());
        }
        let line = line.strip_suffix(';').ok_or("no semicolon")?;
        if let Some(rest) = line.strip_prefix(".reg ") {
            let (class, count) = rest.split_once('%').and_then(|(_, r)| r.split_once('<')).ok_or("registers")?;
            let count: usize = count.trim_end_matches('>').parse().map_err(|_| "register count")?;
            self.classes.push((class.to_string(), self.registers));
            self.registers += count;
            return Ok(());
        }
        if line.starts_with(".shared") {
            let (Some(bytes), Some(name)) = (bracketed(line), symbol(line)) else { return Err("shared".into()) };
            let align = line.split_whitespace().nth(2).and_then(|a| a.parse().ok()).unwrap_or(16usize);
            let at = self.shared.next_multiple_of(align);
            self.symbols.insert(name.to_string(), at);
            self.shared = at + bytes;
            return Ok(());
        }
        let (guard, rest) = match line.strip_prefix('@') {
            None => (None, line),
            Some(rest) => {
                let (p, rest) = rest.split_once(char::is_whitespace).ok_or("guard")?;
                let register = self.register(p.trim_start_matches('!')).ok_or("guard")?;
                (Some((register, p.starts_with('!'))), rest.trim())
            }
        };
        let (mnemonic, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let words: Vec<&str> = mnemonic.split('.').collect();
        if words[0] == "bra" {
            self.branches.push((self.code.len(), operands.trim().to_string()));
        }
        let (op, outputs) = operation(&words)?;
        let mut instruction = Instruction { guard, op, to: Vec::new(), from: Vec::new(), offset: 0, line: number };
        if words[0] != "bra" {
            for (i, operand) in split_operands(operands).into_iter().enumerate() {
                self.operand(&mut instruction, i < outputs, operand)?;
            }
        }
        if let Op::CopyWait(_) | Op::WgmmaWait(_) = op {
            let [Operand::Immediate(groups)] = instruction.from[..] else { return Err("wait".into()) };
            let groups = groups as usize;
            instruction.op = if op == Op::CopyWait(0) { Op::CopyWait(groups) } else { Op::WgmmaWait(groups) };
        }
        self.code.push(instruction);
        Ok(())
    }

    fn operand(&self, instruction: &mut Instruction, is_output: bool, text: &str) -> Result<(), Refusal> {
        if let Some(list) = text.strip_prefix('{') {
            for part in list.trim_end_matches('}').split(',') {
                self.operand(instruction, is_output, part.trim())?;
            }
        } else if let Some(address) = text.strip_prefix('[') {
            let address = address.trim_end_matches(']');
            let (base, offset) = match address.split_once('+') {
                Some((base, offset)) => (base, offset.parse::<i64>().map_err(|_| "offset")?),
                None => (address, 0),
            };
            instruction.offset += offset;
            instruction.from.push(self.value(base)?);
        } else if is_output {
            instruction.to.push(self.register(text).ok_or_else(|| format!("no register {text}"))?);
        } else {
            instruction.from.push(self.value(text)?);
        }
        Ok(())
    }

    fn register(&self, text: &str) -> Option<usize> {
        let name = text.strip_prefix('%')?;
        let digits = name.find(|c: char| c.is_ascii_digit())?;
        let index: usize = name[digits..].parse().ok()?;
        let (_, first) = self.classes.iter().find(|(class, _)| *class == name[..digits])?;
        Some(first + index)
    }

    fn value(&self, text: &str) -> Result<Operand, Refusal> {
        let special = match text {
            "%tid.x" => Some(Special::Thread),
            "%ntid.x" => Some(Special::Threads),
            "%ctaid.x" => Some(Special::Block(0)),
            "%ctaid.y" => Some(Special::Block(1)),
            "%ctaid.z" => Some(Special::Block(2)),
            _ => None,
        };
        if let Some(special) = special {
            return Ok(Operand::Special(special));
        }
        if let Some(register) = self.register(text) {
            return Ok(Operand::Register(register));
        }
        if text == self.param {
            return Ok(Operand::Immediate(0));
        }
        if let Some(at) = self.symbols.get(text) {
            return Ok(Operand::Immediate(*at as u64));
        }
        if self.extern_shared.as_deref() == Some(text) {
            // Behind what the kernel declares itself; kernels have one or the other.
            return if self.symbols.is_empty() { Ok(Operand::Immediate(0)) } else { Err("two shared areas".into()) };
        }
        let number = if let Some(hex) = text.strip_prefix("0f").or(text.strip_prefix("0x")) {
            u64::from_str_radix(hex, 16).ok()
        } else {
            text.parse::<i64>().map(|n| n as u64).ok()
        };
        number.map(Operand::Immediate).ok_or_else(|| format!("operand {text}"))
    }
}

/// At commas outside of braces and brackets.
fn split_operands(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}
