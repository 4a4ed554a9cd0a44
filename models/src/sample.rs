//! The next token from logits.
//!
//! Steps, in the order of transformers' logits processors; each is left out when its setting is neutral:
//!
//! ```text
//! repetition penalty   once for each token of the window: l > 0 becomes l / r, else l * r      (Keskar et al. 2019)
//! frequency, presence  l - frequency * count - presence, for each token of the window
//! temperature          p ~ exp(l / t); t = 0 takes the largest logit and skips the rest
//! top-k                the k largest
//! top-p                the fewest largest whose share of what is left reaches p               (Holtzman et al. 2020)
//! min-p                those with at least min_p times the largest probability                 (Nguyen et al. 2024)
//! draw                 by one uniform number
//! ```
//!
//! Equal logits go by token id. The random numbers and the exponential are written out here in plain arithmetic, so that
//! logits and a seed give the same token with every library, compiler and machine.

mod penalty;
mod rng;

use crate::error::{ModelError, Result};
use nibble_kernels::Isa;

use penalty::Penalties;
pub use penalty::{Penalized, Penalty};
pub(crate) use rng::Rng;

/// How the next token is chosen. The default is the most likely one.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleSettings {
    /// Divisor of logits; 0 takes the largest.
    pub temperature: f32,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens with at least this share of the likeliest one's probability; 0 for all.
    pub min_p: f32,
    /// Makes tokens of the window less likely; 1 leaves them.
    pub repetition_penalty: f32,
    /// Taken off a token's logit for each time it is in the window; 0 leaves it.
    pub frequency_penalty: f32,
    /// Taken off a token's logit when it is in the window; 0 leaves it.
    pub presence_penalty: f32,
    /// How many of the last tokens the penalties see; `None` for all.
    pub penalty_window: Option<usize>,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for SampleSettings {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: None,
            seed: 0,
        }
    }
}

impl SampleSettings {
    fn check(&self) -> Result<()> {
        let rules: [(&str, f32, bool, &str); 6] = [
            ("temperature", self.temperature, self.temperature >= 0.0, "a number from 0"),
            ("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "a number from 0 to 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "a number above 0"),
            ("frequency_penalty", self.frequency_penalty, true, "a finite number"),
            ("presence_penalty", self.presence_penalty, true, "a finite number"),
        ];
        for (what, value, holds, wanted) in rules {
            if !(holds && value.is_finite()) {
                return Err(ModelError::Setting { what: what.to_owned(), why: format!("{value}, wanted {wanted}") });
            }
        }
        Ok(())
    }
}

/// The largest logits of a row, and what all of the row weighs: as much of it as most choices need.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Top {
    /// Tokens and their logits, largest first, equal ones by token; NaN stands before all numbers.
    pub tokens: Vec<(u32, f32)>,
    /// Sum of e^((logit - largest) / temperature) over the row; only where it was asked for.
    pub total: f64,
}

/// What a sampler wants to see of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Look {
    /// The likeliest token.
    Likeliest,
    /// The `k` largest logits, at most [`Look::MOST`], and the total at this temperature.
    Top {
        /// How many.
        k: usize,
        /// Divisor of logits in the total; `None` where nobody asks for it.
        temperature: Option<f32>,
    },
    /// Every logit.
    All,
}

impl Look {
    /// The largest `k`.
    pub const MOST: usize = 1024;
    /// How many logits are looked at where no number is set: mostly they have all of the probability that is asked for.
    const FRONT: usize = 256;
}

/// A token that may be drawn, with its probability relative to the likeliest token's.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    weight: f64,
    id: u32,
}

impl Candidate {
    /// Likeliest first; equal ones by id.
    fn order(a: &Self, b: &Self) -> std::cmp::Ordering {
        b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
    }
}

/// Chooses tokens. Its buffers are reused, so that a token costs no allocation after the first.
#[derive(Debug)]
pub struct Sampler {
    settings: SampleSettings,
    vocab_size: usize,
    rng: Rng,
    penalties: Option<Penalties>,
    penalized: Vec<f32>,
    top: Top,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler for a model with `vocab_size` logits.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn new(settings: SampleSettings, vocab_size: usize) -> Result<Self> {
        settings.check()?;
        Ok(Self {
            rng: Rng::new(settings.seed),
            penalties: Penalties::new(&settings, vocab_size),
            vocab_size,
            settings,
            penalized: Vec::new(),
            top: Top::default(),
            candidates: Vec::new(),
        })
    }

    /// Puts a token of the prompt, or one just chosen, into the window of the penalties.
    pub fn accept(&mut self, token: u32) {
        if let Some(penalties) = &mut self.penalties {
            penalties.accept(token);
        }
    }

    /// How many logits it chooses among.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What is taken off logits before anything else, and of which tokens' logits; `None` where nothing is.
    pub fn penalties(&mut self) -> Option<(Penalty, &[Penalized])> {
        self.penalties.as_mut().map(Penalties::list)
    }

    /// What it wants to see of logits whose penalties are taken off.
    pub fn look(&self) -> Look {
        let SampleSettings { temperature, top_k, top_p, min_p, .. } = self.settings;
        match top_k {
            _ if temperature == 0.0 => Look::Likeliest,
            1 => Look::Likeliest,
            0 if top_p >= 1.0 && min_p == 0.0 => Look::All,
            0 => Look::Top { k: Look::FRONT.min(self.vocab_size), temperature: (top_p < 1.0).then_some(temperature) },
            k if k.min(self.vocab_size) > Look::MOST => Look::All,
            k => Look::Top { k: k.min(self.vocab_size), temperature: None },
        }
    }

    /// Chooses the next token from `(vocab_size)` logits. A logit may be negative infinity: that token is never chosen.
    ///
    /// # Errors
    /// There are more or fewer logits than tokens, one is NaN or positive infinity, or none is finite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.len() != self.vocab_size {
            let why = format!("{} values for a vocabulary of {}", logits.len(), self.vocab_size);
            return Err(ModelError::Logits { why });
        }
        let Some(penalties) = &mut self.penalties else { return self.choose(logits) };
        let (penalty, tokens) = penalties.list();
        let mut penalized = std::mem::take(&mut self.penalized);
        penalized.clear();
        penalized.extend_from_slice(logits);
        penalty.apply(tokens, &mut penalized);
        let chosen = self.choose(&penalized);
        self.penalized = penalized;
        chosen
    }

    /// The same once penalties are taken off.
    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        match self.look() {
            Look::Likeliest => argmax(logits),
            Look::Top { k, temperature } => {
                let mut seen = std::mem::take(&mut self.top);
                let chosen = top(logits, k, temperature, &mut seen).and_then(|()| self.choose_among(&seen));
                self.top = seen;
                match chosen? {
                    Some(token) => Ok(token),
                    None => self.choose_among_all(logits),
                }
            }
            Look::All => self.choose_among_all(logits),
        }
    }

    /// Chooses the next token from what [`Sampler::look`] wanted to see; `None` if it has to see every logit after all.
    ///
    /// # Errors
    /// A logit is NaN or positive infinity, or none is finite.
    pub fn choose_among(&mut self, top: &Top) -> Result<Option<u32>> {
        let Some(&(token, max)) = top.tokens.first() else {
            return Err(ModelError::Logits { why: "none of 0 is finite".to_owned() });
        };
        check(token, max)?;
        if max == f32::NEG_INFINITY {
            return Err(ModelError::Logits { why: format!("none of {} is finite", top.tokens.len()) });
        }
        let temperature = f64::from(self.settings.temperature);
        let weigh = |&(id, logit): &(u32, f32)| {
            let weight = exp((f64::from(logit) - f64::from(max)) / temperature);
            Candidate { weight, id }
        };
        self.candidates.clear();
        self.candidates.extend(top.tokens.iter().map(weigh));
        let is_all = self.candidates.len() == self.vocab_size || self.settings.top_k == self.candidates.len();
        let total = if is_all { self.total() } else { top.total };
        match self.kept(total) {
            Some(kept) => self.candidates.truncate(kept),
            None if is_all => (),
            None => return Ok(None),
        }
        Ok(Some(self.draw()))
    }

    /// The same from every logit.
    ///
    /// # Errors
    /// As [`Sampler::choose_among`].
    pub fn choose_among_all(&mut self, logits: &[f32]) -> Result<u32> {
        let max = f64::from(logits[argmax(logits)? as usize]);
        let temperature = f64::from(self.settings.temperature);
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0..).map(|(&logit, id)| {
            let weight = exp((f64::from(logit) - max) / temperature);
            Candidate { weight, id }
        }));
        let SampleSettings { top_k, top_p, min_p, .. } = self.settings;
        if top_k > 0 || top_p < 1.0 || min_p > 0.0 {
            self.candidates.sort_unstable_by(Candidate::order);
            if top_k > 0 {
                self.candidates.truncate(top_k);
            }
            if let Some(kept) = self.kept(self.total()) {
                self.candidates.truncate(kept);
            }
        }
        Ok(self.draw())
    }

    /// How many of the candidates, likeliest first, top-p and min-p keep, of weights that sum to `total`; `None` if they
    /// keep all of these and perhaps more.
    fn kept(&self, total: f64) -> Option<usize> {
        let (share, least) = (f64::from(self.settings.top_p), f64::from(self.settings.min_p));
        let mut sum = 0.0;
        for (at, candidate) in self.candidates.iter().enumerate() {
            if candidate.weight < least || candidate.weight == 0.0 {
                return Some(at);
            }
            sum += candidate.weight;
            if share < 1.0 && sum >= share * total {
                return Some(at + 1);
            }
        }
        None
    }

    fn total(&self) -> f64 {
        self.candidates.iter().map(|c| c.weight).sum()
    }

    fn draw(&mut self) -> u32 {
        let mut left = self.rng.unit() * self.total();
        let mut id = 0;
        for candidate in self.candidates.iter().filter(|c| c.weight > 0.0) {
            id = candidate.id;
            left -= candidate.weight;
            if left < 0.0 {
                break;
            }
        }
        id
    }
}

/// The `k` largest of a row's logits, and their total at a temperature.
///
/// # Errors
/// A logit is NaN or positive infinity, or none is finite.
pub(crate) fn top(logits: &[f32], k: usize, temperature: Option<f32>, found: &mut Top) -> Result<()> {
    let max = f64::from(logits[argmax(logits)? as usize]);
    let mut places = [0; Look::MOST];
    let count = nibble_kernels::ops::top_k(Isa::best(), logits, &mut places[..k.min(Look::MOST)]);
    found.tokens.clear();
    found.tokens.extend(places[..count].iter().map(|&token| (token, logits[token as usize])));
    found.total = 0.0;
    if let Some(temperature) = temperature.map(f64::from) {
        // Sums of their own, so that one addition doesn't wait for another.
        let mut sums = [0.0; 8];
        for eight in logits.chunks(8) {
            for (sum, logit) in sums.iter_mut().zip(eight) {
                *sum += exp((f64::from(*logit) - max) / temperature);
            }
        }
        found.total = sums.iter().sum();
    }
    Ok(())
}

/// The token with the largest logit, the first of equals.
///
/// # Errors
/// A logit is NaN or positive infinity, or none is finite.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = (f32::NEG_INFINITY, 0);
    for (&logit, id) in logits.iter().zip(0u32..) {
        check(id, logit)?;
        if logit > best.0 {
            best = (logit, id);
        }
    }
    if best.0 == f32::NEG_INFINITY {
        return Err(ModelError::Logits { why: format!("none of {} is finite", logits.len()) });
    }
    Ok(best.1)
}

fn check(token: u32, logit: f32) -> Result<()> {
    if logit.is_nan() || logit == f32::INFINITY {
        return Err(ModelError::Logits { why: format!("{logit} at token {token}, wanted finite numbers") });
    }
    Ok(())
}

/// `e^x` for `x <= 0`, to about one unit in the last place, by additions and multiplications alone; 0 below -700. Without a
/// branch, so that a loop over many is done several at a time.
#[inline(always)]
fn exp(x: f64) -> f64 {
    // ln 2 in two parts: the first has enough trailing zeros for its product with a small integer to be exact.
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // Adding it rounds to an integer, which is then in the lowest bits.
    const ROUNDER: f64 = (3u64 << 51) as f64;
    const TERMS: [f64; 14] = {
        let (mut terms, mut n) = ([1.0; 14], 1);
        while n < 14 {
            terms[n] = terms[n - 1] / n as f64;
            n += 1;
        }
        terms
    };
    let shifted = x * std::f64::consts::LOG2_E + ROUNDER;
    let power = shifted - ROUNDER;
    let rest = x - power * LN2_HIGH - power * LN2_LOW;
    // |rest| <= ln(2) / 2, where the Taylor series to the 13th power is exact to f64.
    let mut sum = TERMS[13];
    for n in (0..13).rev() {
        sum = TERMS[n] + rest * sum;
    }
    let scale = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x >= -700.0 { sum * scale } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_right_to_a_few_units_in_the_last_place() {
        for i in 0..=70_000 {
            let x = f64::from(-i) / 100.0;
            let (found, wanted) = (exp(x), x.exp());
            assert!((found - wanted).abs() <= 4.0 * f64::EPSILON * wanted, "e^{x}: {found}, wanted {wanted}");
        }
        assert_eq!([exp(0.0), exp(-701.0), exp(f64::NEG_INFINITY)], [1.0, 0.0, 0.0]);
    }
}
