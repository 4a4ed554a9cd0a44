use nibble_models::{ModelError, StopStrings};
use proptest::prelude::*;

/// Feeds the parts of a text; what came out, and what was found.
fn run(stops: &[&str], parts: &[&str]) -> (String, Option<String>) {
    let mut watch = StopStrings::new(stops.iter().copied()).unwrap();
    let mut out = String::new();
    for part in parts {
        out.push_str(watch.push(part));
    }
    out.push_str(watch.finish());
    (out, watch.found().map(str::to_owned))
}

#[test]
fn output_ends_before_the_stop_string_wherever_borders_fall() {
    /// Stop strings, parts of the text, what is shown, the stop string found.
    type Case = (&'static [&'static str], &'static [&'static str], &'static str, Option<&'static str>);
    let cases: [Case; 9] = [
        (&["\n\nUser:"], &["Hi", ".\n", "\nUs", "er: more"], "Hi.", Some("\n\nUser:")),
        (&["\n\nUser:"], &["Hi.\n", "\nUs", "age"], "Hi.\n\nUsage", None),
        (&["</s>"], &["a<", "/", "s", "x</s", ">y"], "a</sx", Some("</s>")),
        (&["日本"], &["今", "日", "日", "本語"], "今日", Some("日本")),
        (&["aab"], &["aaa", "a", "b"], "aa", Some("aab")),
        (&["abcd", "bc"], &["abcd"], "a", Some("bc")),
        (&["bc", "abc"], &["ab", "c"], "", Some("abc")),
        (&["x"], &["", "x", "y"], "", Some("x")),
        (&[], &["any", "thing"], "anything", None),
    ];
    for (stops, parts, wanted, found) in cases {
        assert_eq!(run(stops, parts), (wanted.to_owned(), found.map(str::to_owned)), "{stops:?} {parts:?}");
    }
}

#[test]
fn text_that_cannot_become_a_stop_string_is_not_held_back() {
    let mut watch = StopStrings::new(["END"]).unwrap();
    assert_eq!(watch.push("the E"), "the ");
    assert_eq!(watch.push("N"), "");
    assert_eq!(watch.push("ERGY"), "ENERGY");
    assert_eq!(watch.push("EN"), "");
    assert_eq!(watch.finish(), "EN");
}

#[test]
fn an_empty_stop_string_is_refused() {
    assert!(matches!(StopStrings::new(["a", ""]), Err(ModelError::Setting { .. })));
}

proptest! {
    #[test]
    fn the_result_depends_on_the_text_alone(
        text in "[abé]{0,24}",
        stops in prop::collection::vec("[abé]{1,4}", 0..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let letters: Vec<(usize, char)> = text.char_indices().collect();
        let mut borders: Vec<usize> = cuts.iter().filter(|_| !letters.is_empty()).map(|c| letters[c.index(letters.len())].0).collect();
        borders.extend([0, text.len()]);
        borders.sort_unstable();
        let parts: Vec<&str> = borders.windows(2).map(|w| &text[w[0]..w[1]]).collect();

        // The stop string that is complete first, the longest of those complete at once.
        let end = (0..=text.len()).find(|&end| text.is_char_boundary(end) && stops.iter().any(|s| text[..end].ends_with(s)));
        let wanted = match end {
            Some(end) => {
                let stop = stops.iter().filter(|s| text[..end].ends_with(**s)).max_by_key(|s| s.len()).unwrap();
                (text[..end - stop.len()].to_owned(), Some((*stop).to_owned()))
            }
            None => (text.clone(), None),
        };
        prop_assert_eq!(run(&stops, &parts), wanted);
    }
}
