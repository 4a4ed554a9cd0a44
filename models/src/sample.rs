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

use penalty::Penalties;
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
    /// Whether they always take the largest logit as it is.
    pub fn takes_the_likeliest(&self) -> bool {
        let is_free = self.repetition_penalty == 1.0 && self.frequency_penalty == 0.0 && self.presence_penalty == 0.0;
        self.temperature == 0.0 && is_free
    }

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
            candidates: Vec::new(),
        })
    }

    /// Puts a token of the prompt, or one just chosen, into the window of the penalties.
    pub fn accept(&mut self, token: u32) {
        if let Some(penalties) = &mut self.penalties {
            penalties.accept(token);
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
        let logits = match &self.penalties {
            Some(penalties) => {
                self.penalized.clear();
                self.penalized.extend_from_slice(logits);
                penalties.apply(&mut self.penalized);
                &self.penalized
            }
            None => logits,
        };
        let best = argmax(logits)?;
        if self.settings.temperature == 0.0 || self.settings.top_k == 1 {
            return Ok(best);
        }
        let (max, temperature) = (f64::from(logits[best as usize]), f64::from(self.settings.temperature));
        let weights = logits.iter().zip(0..).map(|(&logit, id)| {
            let weight = exp((f64::from(logit) - max) / temperature);
            Candidate { weight, id }
        });
        self.candidates.clear();
        self.candidates.extend(weights.filter(|c| c.weight > 0.0));
        self.keep_top_k();
        self.keep_top_p();
        if self.settings.min_p > 0.0 {
            let least = f64::from(self.settings.min_p);
            self.candidates.retain(|c| c.weight >= least);
        }
        Ok(self.draw())
    }

    fn keep_top_k(&mut self) {
        let k = self.settings.top_k;
        if k == 0 || k >= self.candidates.len() {
            return;
        }
        self.candidates.select_nth_unstable_by(k - 1, Candidate::order);
        self.candidates.truncate(k);
        self.candidates.sort_unstable_by(Candidate::order);
    }

    fn keep_top_p(&mut self) {
        if self.settings.top_p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let target = f64::from(self.settings.top_p) * total;
        let len = self.candidates.len();
        let (mut sorted, mut step, mut sum) = (0, 64, 0.0);
        // The kept tokens are few as a rule: sort a growing front instead of all.
        while sorted < len {
            let rest = &mut self.candidates[sorted..];
            let front = step.min(rest.len());
            if front < rest.len() {
                rest.select_nth_unstable_by(front - 1, Candidate::order);
            }
            rest[..front].sort_unstable_by(Candidate::order);
            for candidate in &rest[..front] {
                sum += candidate.weight;
                sorted += 1;
                if sum >= target {
                    self.candidates.truncate(sorted);
                    return;
                }
            }
            step *= 4;
        }
    }

    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let mut left = self.rng.unit() * total;
        let mut id = 0;
        for candidate in &self.candidates {
            id = candidate.id;
            left -= candidate.weight;
            if left < 0.0 {
                break;
            }
        }
        id
    }
}

/// The token with the largest logit, the first of equals.
///
/// # Errors
/// A logit is NaN or positive infinity, or none is finite.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = (f32::NEG_INFINITY, 0);
    for (&logit, id) in logits.iter().zip(0u32..) {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(ModelError::Logits { why: format!("{logit} at token {id}, wanted finite numbers") });
        }
        if logit > best.0 {
            best = (logit, id);
        }
    }
    if best.0 == f32::NEG_INFINITY {
        return Err(ModelError::Logits { why: format!("none of {} is finite", logits.len()) });
    }
    Ok(best.1)
}

/// `e^x` for `x <= 0`, to about one unit in the last place, by additions and multiplications alone; 0 below -700.
fn exp(x: f64) -> f64 {
    // ln 2 in two parts: the first has enough trailing zeros for its product with a small integer to be exact.
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    if x.is_nan() || x < -700.0 {
        return 0.0;
    }
    let power = (x * std::f64::consts::LOG2_E).round();
    let rest = x - power * LN2_HIGH - power * LN2_LOW;
    // |rest| <= ln(2) / 2, where the Taylor series to the 13th power is exact to f64.
    let sum = (1..=13).rev().fold(1.0, |sum, n| 1.0 + rest * sum / f64::from(n));
    sum * f64::from_bits(((1023 + power as i64) as u64) << 52)
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
