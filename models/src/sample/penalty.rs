//! What makes repeated tokens less likely: how often each was among the last ones.

use std::collections::VecDeque;

use super::SampleSettings;

/// Counts of the tokens in the window.
#[derive(Debug)]
pub(super) struct Penalties {
    repetition: f32,
    frequency: f32,
    presence: f32,
    counts: Vec<u32>,
    /// Tokens that have ever been counted, each once.
    seen: Vec<u32>,
    was_seen: Vec<bool>,
    /// The tokens in the window, oldest first; empty where the window takes all.
    window: VecDeque<u32>,
    limit: Option<usize>,
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
            repetition: repetition_penalty,
            frequency: frequency_penalty,
            presence: presence_penalty,
            counts: vec![0; vocab_size],
            seen: Vec::with_capacity(vocab_size),
            was_seen: vec![false; vocab_size],
            window: VecDeque::new(),
            limit: penalty_window,
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

    pub(super) fn apply(&self, logits: &mut [f32]) {
        for &token in &self.seen {
            let count = self.counts[token as usize];
            if count == 0 {
                continue;
            }
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            *logit -= self.frequency * count as f32 + self.presence;
        }
    }
}
