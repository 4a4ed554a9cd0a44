use nibble_models::{Look, ModelError, SampleSettings, Sampler, argmax};
use proptest::prelude::*;

const NEVER: f32 = f32::NEG_INFINITY;

/// Logits with ties, gaps, a forbidden token, and a spread that every filter cuts somewhere.
fn logits() -> Vec<f32> {
    (0..40).map(|i| if i == 17 { NEVER } else { ((i * 7) % 20) as f32 * 0.4 - 3.0 }).collect()
}

/// The distribution that the settings describe, step by step and over sorted lists.
fn distribution(settings: &SampleSettings, logits: &[f32], history: &[u32]) -> Vec<f64> {
    let mut logits: Vec<f32> = logits.to_vec();
    let start = settings.penalty_window.map_or(0, |w| history.len().saturating_sub(w));
    for token in 0..logits.len() {
        let count = history[start..].iter().filter(|t| **t as usize == token).count();
        if count > 0 {
            let l = &mut logits[token];
            *l = if *l > 0.0 { *l / settings.repetition_penalty } else { *l * settings.repetition_penalty };
            *l -= settings.frequency_penalty * count as f32 + settings.presence_penalty;
        }
    }
    let mut p: Vec<(usize, f64)> =
        logits.iter().map(|l| (f64::from(*l) / f64::from(settings.temperature)).exp()).enumerate().collect();
    p.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if settings.top_k > 0 {
        p.truncate(settings.top_k);
    }
    let total: f64 = p.iter().map(|x| x.1).sum();
    let mut sum = 0.0;
    let keep = p
        .iter()
        .position(|x| {
            sum += x.1;
            sum >= f64::from(settings.top_p) * total
        })
        .map_or(p.len(), |i| i + 1);
    if settings.top_p < 1.0 {
        p.truncate(keep);
    }
    let largest = p[0].1;
    p.retain(|x| x.1 >= f64::from(settings.min_p) * largest);
    let total: f64 = p.iter().map(|x| x.1).sum();
    let mut out = vec![0.0; logits.len()];
    for (token, weight) in p {
        out[token] = weight / total;
    }
    out
}

fn settings_to_try() -> Vec<SampleSettings> {
    let base = SampleSettings { temperature: 1.0, seed: 7, ..SampleSettings::default() };
    let penalties =
        SampleSettings { repetition_penalty: 1.5, frequency_penalty: 0.3, presence_penalty: 0.2, ..base.clone() };
    vec![
        base.clone(),
        SampleSettings { temperature: 0.3, ..base.clone() },
        SampleSettings { temperature: 2.5, ..base.clone() },
        SampleSettings { top_k: 5, ..base.clone() },
        SampleSettings { top_k: 1000, ..base.clone() },
        SampleSettings { top_p: 0.7, ..base.clone() },
        SampleSettings { top_p: 0.0, ..base.clone() },
        SampleSettings { min_p: 0.2, ..base.clone() },
        SampleSettings { top_k: 9, top_p: 0.8, min_p: 0.1, temperature: 1.3, ..base.clone() },
        penalties.clone(),
        SampleSettings { penalty_window: Some(3), top_k: 10, ..penalties.clone() },
        SampleSettings { penalty_window: Some(0), ..penalties },
    ]
}

const HISTORY: [u32; 8] = [8, 19, 39, 19, 2, 2, 5, 19];

#[test]
fn draws_follow_the_distribution_that_the_settings_describe() {
    const DRAWS: usize = 40_000;
    for settings in settings_to_try() {
        let wanted = distribution(&settings, &logits(), &HISTORY);
        let mut sampler = Sampler::new(settings.clone(), 40).unwrap();
        HISTORY.iter().for_each(|t| sampler.accept(*t));
        let mut counts = [0usize; 40];
        for _ in 0..DRAWS {
            counts[sampler.sample(&logits()).unwrap() as usize] += 1;
        }
        let mut chi_square = 0.0;
        let mut freedom = -1.0;
        for (count, p) in counts.iter().zip(&wanted) {
            if *p == 0.0 {
                assert_eq!(*count, 0, "{settings:?}: a token that was cut off");
            } else {
                let expected = p * DRAWS as f64;
                chi_square += (*count as f64 - expected).powi(2) / expected;
                freedom += 1.0;
            }
        }
        // Mean and deviation of the chi-square distribution; the seed is fixed, so this can't fail now and then.
        assert!(chi_square <= freedom + 5.0 * (2.0f64 * freedom).sqrt(), "{settings:?}: {chi_square} for {freedom}");
    }
}

#[test]
fn the_most_likely_token_needs_no_randomness() {
    for settings in
        [SampleSettings::default(), SampleSettings { top_k: 1, temperature: 1.0, ..SampleSettings::default() }]
    {
        let mut sampler = Sampler::new(settings, 5).unwrap();
        assert_eq!(sampler.sample(&[0.0, 3.0, NEVER, 3.0, -1.0]).unwrap(), 1, "the first of equals");
        assert_eq!(sampler.sample(&[NEVER, NEVER, NEVER, NEVER, -1e30]).unwrap(), 4);
    }
}

#[test]
fn a_seed_gives_the_same_tokens_for_ever() {
    let draw = |seed| {
        let settings = SampleSettings { temperature: 1.0, seed, ..SampleSettings::default() };
        let mut sampler = Sampler::new(settings, 1000).unwrap();
        (0..12).map(|_| sampler.sample(&[0.0; 1000]).unwrap()).collect::<Vec<u32>>()
    };
    // floor(1000 u) for the first numbers of xoshiro256++ seeded by SplitMix64(42), worked out apart from this code.
    assert_eq!(draw(42), [814, 318, 983, 701, 793, 588, 125, 605, 207, 933, 559, 850]);
    assert_ne!(draw(42), draw(43));
}

#[test]
fn equal_logits_are_cut_by_token_id() {
    let settings = SampleSettings { temperature: 1.0, top_k: 3, ..SampleSettings::default() };
    let mut sampler = Sampler::new(settings, 100).unwrap();
    assert!((0..200).all(|_| sampler.sample(&[1.0; 100]).unwrap() < 3));
}

#[test]
fn penalties_forget_what_leaves_the_window() {
    let settings = SampleSettings { penalty_window: Some(2), presence_penalty: 10.0, ..SampleSettings::default() };
    let mut sampler = Sampler::new(settings, 4).unwrap();
    let logits = [3.0, 2.0, 1.0, 0.0];
    let mut tokens = Vec::new();
    for _ in 0..9 {
        let token = sampler.sample(&logits).unwrap();
        sampler.accept(token);
        tokens.push(token);
    }
    assert_eq!(tokens, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    sampler.accept(u32::MAX);
    assert_eq!(sampler.sample(&logits).unwrap(), 0);
}

#[test]
fn a_large_vocabulary_is_cut_like_a_small_one() {
    let logits: Vec<f32> =
        (0..50_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 21) as f32).collect();
    for top_p in [0.1, 0.5, 0.9, 0.999] {
        let settings = SampleSettings { temperature: 1.0, top_p, seed: 3, ..SampleSettings::default() };
        let wanted = distribution(&settings, &logits, &[]);
        let mut sampler = Sampler::new(settings, logits.len()).unwrap();
        for _ in 0..20 {
            let token = sampler.sample(&logits).unwrap();
            assert!(wanted[token as usize] > 0.0, "top_p {top_p}: token {token}");
        }
    }
}

#[test]
fn the_largest_logits_are_enough_to_draw_as_from_all() {
    let logits: Vec<f32> = (0..3000u32).map(|i| (i.wrapping_mul(2_654_435_761) % 1000) as f32 / 90.0).collect();
    let base = SampleSettings { temperature: 0.8, seed: 11, ..SampleSettings::default() };
    for (settings, look) in [
        (SampleSettings { temperature: 0.0, top_k: 9, ..base.clone() }, Look::Likeliest),
        (SampleSettings { top_k: 1, ..base.clone() }, Look::Likeliest),
        (SampleSettings { top_k: 40, top_p: 0.9, ..base.clone() }, Look::Top { k: 40, temperature: None }),
        (SampleSettings { top_k: 2000, top_p: 0.9, ..base.clone() }, Look::All),
        (SampleSettings { top_p: 0.3, ..base.clone() }, Look::Top { k: 256, temperature: Some(0.8) }),
        // 256 of these don't weigh as much as that.
        (SampleSettings { top_p: 0.99, min_p: 1e-4, ..base.clone() }, Look::Top { k: 256, temperature: Some(0.8) }),
        (SampleSettings { min_p: 0.5, ..base.clone() }, Look::Top { k: 256, temperature: None }),
        (base, Look::All),
    ] {
        let [mut few, mut all] = [(); 2].map(|()| Sampler::new(settings.clone(), logits.len()).unwrap());
        assert_eq!(few.look(), look, "{settings:?}");
        for _ in 0..300 {
            let wanted = if look == Look::Likeliest { argmax(&logits) } else { all.choose_among_all(&logits) };
            assert_eq!(few.sample(&logits).unwrap(), wanted.unwrap(), "{settings:?}");
        }
    }
}

#[test]
fn logits_that_mean_nothing_are_refused_by_token() {
    let mut settings = vec![SampleSettings::default()];
    settings.extend(settings_to_try());
    for settings in settings {
        let mut sampler = Sampler::new(settings, 3).unwrap();
        let mut refuse = |logits: &[f32], part: &str| match sampler.sample(logits) {
            Err(ModelError::Logits { why }) => assert!(why.contains(part), "{why}"),
            other => panic!("{other:?}"),
        };
        refuse(&[0.0, f32::NAN, 1.0], "token 1");
        refuse(&[0.0, 1.0, f32::INFINITY], "token 2");
        refuse(&[NEVER; 3], "none of 3");
        refuse(&[0.0; 4], "4 values for a vocabulary of 3");
        refuse(&[], "0 values");
    }
    assert!(argmax(&[]).is_err());
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let d = SampleSettings::default;
    let cases = [
        ("temperature", SampleSettings { temperature: -0.1, ..d() }),
        ("temperature", SampleSettings { temperature: f32::NAN, ..d() }),
        ("temperature", SampleSettings { temperature: f32::INFINITY, ..d() }),
        ("top_p", SampleSettings { top_p: 1.1, ..d() }),
        ("top_p", SampleSettings { top_p: f32::NAN, ..d() }),
        ("min_p", SampleSettings { min_p: -0.1, ..d() }),
        ("repetition_penalty", SampleSettings { repetition_penalty: 0.0, ..d() }),
        ("frequency_penalty", SampleSettings { frequency_penalty: f32::NAN, ..d() }),
        ("presence_penalty", SampleSettings { presence_penalty: f32::INFINITY, ..d() }),
    ];
    for (name, settings) in cases {
        match Sampler::new(settings, 3) {
            Err(ModelError::Setting { what, .. }) => assert_eq!(what, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

proptest! {
    #[test]
    fn no_setting_chooses_a_token_of_no_probability(
        logits in prop::collection::vec(prop_oneof![4 => -50f32..50.0, 1 => Just(NEVER)], 1..60),
        temperature in 1e-6f32..20.0, top_k in 0usize..70, top_p in 0f32..=1.0, min_p in 0f32..=1.0, seed: u64,
    ) {
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        let settings = SampleSettings { temperature, top_k, top_p, min_p, seed, ..SampleSettings::default() };
        let mut sampler = Sampler::new(settings, logits.len()).unwrap();
        for _ in 0..5 {
            let token = sampler.sample(&logits).unwrap() as usize;
            prop_assert!(logits[token].is_finite());
            let larger = logits.iter().filter(|l| **l > logits[token]).count();
            prop_assert!(top_k == 0 || larger < top_k);
            let best = logits[argmax(&logits).unwrap() as usize];
            let share = (f64::from(logits[token] - best) / f64::from(temperature)).exp();
            prop_assert!(share >= f64::from(min_p) * (1.0 - 1e-4));
        }
    }
}
