//! Which tensor gets how many bytes, under a budget: of all choices the one of least predicted loss.
//!
//! Losses add up over tensors, so each step to a larger choice has a price, the loss that a byte takes away. Steps are
//! taken cheapest first. Where a tensor's losses don't fall ever more slowly, the steps in between are left out (its lower
//! convex hull), so that a dear step never hides a cheap one behind it.

/// What a tensor may become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offer {
    /// Bytes it takes.
    pub bytes: u64,
    /// What it is predicted to cost the model.
    pub loss: f64,
}

/// The index of each tensor's offer, such that all together take at most `budget` bytes; `None` if not even the smallest
/// ones do, or a tensor has no offer. Losses that aren't numbers are never chosen over ones that are.
pub fn allocate(tensors: &[Vec<Offer>], budget: u64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = tensors.iter().map(|offers| hull(offers)).collect();
    let mut chosen = Vec::with_capacity(tensors.len());
    let mut taken = 0u64;
    for (offers, hull) in tensors.iter().zip(&hulls) {
        let first = *hull.first()?;
        taken = taken.saturating_add(offers[first].bytes);
        chosen.push(first);
    }
    if taken > budget {
        return None;
    }
    struct Step {
        tensor: usize,
        to: usize,
        bytes: u64,
        worth: f64,
    }
    let mut steps = Vec::new();
    for (tensor, (offers, hull)) in tensors.iter().zip(&hulls).enumerate() {
        for pair in hull.windows(2) {
            let (from, to) = (offers[pair[0]], offers[pair[1]]);
            let bytes = to.bytes - from.bytes;
            steps.push(Step { tensor, to: pair[1], bytes, worth: (from.loss - to.loss) / bytes as f64 });
        }
    }
    // Stable: equal worth goes by the order of tensors, and a tensor's own steps keep theirs.
    steps.sort_by(|a, b| b.worth.total_cmp(&a.worth));
    let mut ended = vec![false; tensors.len()];
    for step in steps {
        // A later step of a tensor builds on its earlier ones.
        if ended[step.tensor] {
            continue;
        }
        if taken + step.bytes > budget {
            ended[step.tensor] = true;
            continue;
        }
        taken += step.bytes;
        chosen[step.tensor] = step.to;
    }
    Some(chosen)
}

/// Offers from the smallest on, each worth less a byte than the one before.
fn hull(offers: &[Offer]) -> Vec<usize> {
    let mut by_size: Vec<usize> = (0..offers.len()).filter(|i| offers[*i].loss.is_finite()).collect();
    by_size.sort_by(|a, b| offers[*a].bytes.cmp(&offers[*b].bytes).then(offers[*a].loss.total_cmp(&offers[*b].loss)));
    let worth = |a: usize, b: usize| (offers[a].loss - offers[b].loss) / (offers[b].bytes - offers[a].bytes) as f64;
    let mut hull: Vec<usize> = Vec::new();
    for at in by_size {
        match hull.last() {
            Some(last) if offers[at].bytes == offers[*last].bytes || offers[at].loss >= offers[*last].loss => continue,
            _ => {}
        }
        while let [.., a, b] = hull.as_slice()
            && worth(*a, *b) <= worth(*b, at)
        {
            hull.pop();
        }
        hull.push(at);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn total(tensors: &[Vec<Offer>], chosen: &[usize]) -> (u64, f64) {
        let each = tensors.iter().zip(chosen).map(|(offers, i)| offers[*i]);
        each.fold((0, 0.0), |(bytes, loss), o| (bytes + o.bytes, loss + o.loss))
    }

    /// The least loss of all choices within a budget, by trying them all.
    fn best(tensors: &[Vec<Offer>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = tensors.split_first() else { return Some(0.0) };
        let each = first.iter().filter(|o| o.bytes <= budget);
        each.filter_map(|o| Some(o.loss + best(rest, budget - o.bytes)?)).min_by(f64::total_cmp)
    }

    fn offers() -> impl Strategy<Value = Vec<Vec<Offer>>> {
        let offer = (1u64..40, 0.0f64..10.0).prop_map(|(bytes, loss)| Offer { bytes, loss });
        proptest::collection::vec(proptest::collection::vec(offer, 1..5), 1..6)
    }

    proptest! {
        #[test]
        fn the_budget_holds_and_at_its_own_size_nothing_is_better(tensors in offers(), budget in 1u64..200) {
            match allocate(&tensors, budget) {
                None => prop_assert!(best(&tensors, budget).is_none()),
                Some(chosen) => {
                    let (bytes, loss) = total(&tensors, &chosen);
                    prop_assert!(bytes <= budget);
                    // At most one step was too large: what it would have gained is all that can be missed.
                    let dearest: f64 = tensors.iter().map(|offers| {
                        let losses = || offers.iter().map(|o| o.loss);
                        losses().fold(0.0, f64::max) - losses().fold(f64::INFINITY, f64::min)
                    }).fold(0.0, f64::max);
                    let least = best(&tensors, budget).unwrap();
                    prop_assert!(loss <= least + dearest + 1e-9, "{loss} where {least} is possible");
                }
            }
        }

        #[test]
        fn a_larger_budget_never_costs(tensors in offers(), budget in 1u64..200) {
            // Compared where all steps fit: at the sizes that the choices themselves take.
            let Some(small) = allocate(&tensors, budget) else { return Ok(()) };
            let all: u64 = tensors.iter().flatten().map(|o| o.bytes).sum();
            let large = allocate(&tensors, all).unwrap();
            prop_assert!(total(&tensors, &large).1 <= total(&tensors, &small).1 + 1e-9);
        }
    }

    #[test]
    fn bytes_go_where_they_take_most_loss_away() {
        let ladder = |weight: f64| -> Vec<Offer> {
            [(3, 4.0), (4, 1.0), (5, 0.25)].map(|(bytes, loss)| Offer { bytes, loss: weight * loss }).to_vec()
        };
        let tensors = [ladder(1.0), ladder(100.0), ladder(0.01)];
        assert_eq!(allocate(&tensors, 8), None);
        assert_eq!(allocate(&tensors, 9), Some(vec![0, 0, 0]));
        assert_eq!(allocate(&tensors, 10), Some(vec![0, 1, 0]));
        assert_eq!(allocate(&tensors, 12), Some(vec![1, 2, 0]));
        assert_eq!(allocate(&tensors, 99), Some(vec![2, 2, 2]));
    }
}
