//! What makes repeated tokens less likely: how often each was among the last ones.

use std::collections::VecDeque;

use super::SampleSettings;
use bytemuck::{Pod, Zeroable};

/// What is taken off the logits of tokens of the window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalty {
    /// A positive logit is divided by it, a negative one multiplied.
    pub repetition: f32,
    /// Then taken off for each time.
    pub frequency: f32,
    /// Then taken off once.
    pub presence: f32,
}

impl Penalty {
    /// Takes it off these tokens' logits.
    pub fn apply(&self, tokens: &[Penalized], logits: &mut [f32]) {
        for &Penalized { token, count } in tokens {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            *logit -= self.frequency * count as f32 + self.presence;
        }
    }
}

/// A token of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Penalized {
    /// The token.
    pub token: u32,
    /// How often it is there.
    pub count: u32,
}

/// Counts of the tokens in the window.
#[derive(Debug)]
pub(super) struct Penalties {
    penalty: Penalty,
    counts: Vec<u32>,
    /// Tokens that have ever been counted, each once.
    seen: Vec<u32>,
    was_seen: Vec<bool>,
    /// The tokens in the window, oldest first; empty where the window takes all.
    window: VecDeque<u32>,
    limit: Option<usize>,
    /// Those of the window, as they were last asked for.
    list: Vec<Penalized>,
}

impl Penalties {
    /// `None` where every penalty is neutral.
    pub(super) fn new(settings: &SampleSettings, vocab_size: usize) -> Option<Self> {
        let SampleSettings { repetition_penalty, frequency_penalty, presence_penalty, penalty_window, .. } = *settings;
        if (repetition_penalty == 1.0 && frequency_penalty == 0.0 && presence_penalty == 0.0)
            || penalty_window == Some(0)
        {
            return None;
        }
        Some(Self {
            penalty: Penalty {
                repetition: repetition_penalty,
                frequency: frequency_penalty,
                presence: presence_penalty,
            },
            counts: vec![0; vocab_size],
            seen: Vec::with_capacity(vocab_size),
            was_seen: vec![false; vocab_size],
            window: VecDeque::new(),
            limit: penalty_window,
            list: Vec::new(),
        })
    }

    pub(super) fn accept(&mut self, token: u32) {
        let Some(count) = self.counts.get_mut(token as usize) else { return };
        *count += 1;
        if !std::mem::replace(&mut self.was_seen[token as usize], true) {
            self.seen.push(token);
        }
        if let Some(limit) = self.limit {
            self.window.push_back(token);
            if self.window.len() > limit
                && let Some(oldest) = self.window.pop_front()
            {
                self.counts[oldest as usize] -= 1;
            }
        }
    }

    /// The penalty and the tokens of the window, each once.
    pub(super) fn list(&mut self) -> (Penalty, &[Penalized]) {
        let counted = self.seen.iter().map(|&token| Penalized { token, count: self.counts[token as usize] });
        self.list.clear();
        self.list.extend(counted.filter(|p| p.count > 0));
        (self.penalty, &self.list)
    }
}
