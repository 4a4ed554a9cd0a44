//! Reports as a browser shows them: a headless Chromium opens the page, uses its filter, its sorting and its tips, and says what
//! it sees. Without one (scripts/test.sh installs it where it may) only the text is looked at.

use super::vision::{QUANTIZE, place};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("NIBBLE_BROWSER").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = ["chromium", "chromium-browser", "google-chrome"];
    let mut places = std::env::split_paths(&path).flat_map(|dir| known.map(|name| dir.join(name)));
    let found = named.or_else(|| places.find(|file| file.is_file()));
    if found.is_none() {
        eprintln!("no Chromium: the report isn't opened");
    }
    found
}

/// Runs before the page's own script.
const WATCH: &str = "<script>window.problems = [];
addEventListener('error', (e) => problems.push(String(e.message)), true);
console.error = console.warn = (...words) => problems.push(words.join(' '));</script>";

/// Runs after it, with the parts that have bars and distributions in place of BARS and PLOTS.
const USE: &str = "<script>
const bars = document.querySelector('BARS');
const seen = () => [...bars.querySelectorAll('li')].filter((li) => li.offsetParent).map((li) => li.dataset.name);
const seenBefore = seen();
bars.querySelector('.sort').click();
const sorted = seen();
bars.querySelector('.sort').click();
const filter = bars.querySelector('.filter');
filter.value = 'CONV.C2';
filter.dispatchEvent(new Event('input'));
const filtered = seen();
const bar = bars.querySelector('li[data-name=\"Conv.c2\"]');
bar.focus();
const focused = document.activeElement === bar;
// A window that isn't in front, as a headless one isn't always, gives its focus without saying so to the page.
if (!document.hasFocus()) bar.dispatchEvent(new FocusEvent('focusin', { bubbles: true }));
const tip = document.querySelector('#tip');
const told = tip.hidden ? '' : tip.textContent;
document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }));
const details = document.querySelector('PLOTS details');
details.open = true;
const box = (of) => { const r = of.getBoundingClientRect(); return [r.width, r.height]; };
document.body.dataset.outcome = JSON.stringify({
  problems, ready: document.documentElement.dataset.ready, seenBefore, sorted, filtered, focused, told, hidden: tip.hidden,
  plots: [...details.querySelectorAll('svg')].map(box), overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});</script>";

/// What the page says of itself in a window of this width.
fn opened(browser: &Path, page: &Path, width: u32) -> Value {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new(browser)
        .args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--dump-dom",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--window-size={width},900"))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let outcome = dom.split_once("data-outcome=\"").and_then(|(_, rest)| rest.split_once('"'));
    let (outcome, _) = outcome.unwrap_or_else(|| panic!("{dom}\n{}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_str(
        &outcome.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"),
    )
    .unwrap()
}

/// Opens a page in windows of two widths and uses it.
fn used(browser: &Path, html: &str, folder: &Path, [bars, plots]: [&str; 2], sorted_is_other: bool) {
    let script = USE.replace("BARS", bars).replace("PLOTS", plots);
    let watched =
        html.replacen("<head>", &format!("<head>{WATCH}"), 1).replacen("</body>", &format!("{script}</body>"), 1);
    let page = folder.join("watched.html");
    std::fs::write(&page, watched).unwrap();
    for width in [1200, 500] {
        let found = opened(browser, &page, width);
        assert_eq!((&found["problems"], &found["ready"]), (&Value::Array(Vec::new()), &Value::from("yes")), "{found}");
        let names = |key: &str| {
            found[key].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_owned()).collect::<Vec<String>>()
        };
        assert_eq!(names("seenBefore"), ["Conv.c1", "Conv.c2", "Gemm.logits"]);
        let mut sorted = names("sorted");
        assert!(!sorted_is_other || sorted != names("seenBefore"), "the worst of its layers isn't the first one");
        sorted.sort();
        assert_eq!(sorted, names("seenBefore"));
        assert_eq!(names("filtered"), ["Conv.c2"]);
        assert_eq!(found["focused"], true, "a bar can be reached by keyboard");
        let told = found["told"].as_str().unwrap();
        assert!(told.starts_with("Conv.c2: ") && told.contains("dB") && found["hidden"] == true, "{found}");
        let plots = found["plots"].as_array().unwrap();
        assert!(
            plots.len() == 2 && plots.iter().all(|p| p[0].as_f64().unwrap() > 200.0 && p[1].as_f64().unwrap() > 50.0)
        );
        assert_eq!(found["overflow"], 0, "{width}: nothing is wider than the window");
    }
}

#[test]
fn a_report_of_a_diagnosis_works_in_a_browser() {
    let place = place();
    let words =
        ["vision", "diagnose", "model.onnx", "--calib", "calib.npy", "--data", "eval.npy", "--report", "page.html"];
    place.run(&words).ok();
    let html = std::fs::read_to_string(place.path("page.html")).unwrap();
    for part in ["Conv.c1", "Gemm.logits", "w2", "nibble vision diagnose model.onnx", "Where the error comes from"] {
        assert!(html.contains(part), "{part}");
    }
    assert!(!html.contains("://"), "nothing is fetched");
    assert!(place.run(&words).error(1).contains("is there already"));
    let Some(browser) = browser() else { return };
    used(&browser, &html, &place.path("."), ["#part1", "#part3"], true);
}

#[test]
fn a_report_of_a_quantization_works_in_a_browser() {
    let place = place();
    let words = [&QUANTIZE[..], &["--report", "page.html"]].concat();
    place.run(&words).ok();
    let html = std::fs::read_to_string(place.path("page.html")).unwrap();
    let recipe = format!("nibble {}", words.join(" "));
    for part in ["Conv.c1", "Gemm.logits", "w2", recipe.as_str(), "The whole", "logits: SQNR dB", "int8"] {
        assert!(html.contains(part), "{part}");
    }
    assert!(!html.contains("://"), "nothing is fetched");
    assert!(place.run(&[&words[..], &["--force"]].concat()).ok().contains("in integers"));
    let again =
        place.run(&[&words[..3], &["-o", "other.onnx", "--calib", "calib.npy", "--report", "page.html"]].concat());
    assert!(again.error(1).contains("page.html"), "{}", again.stderr);
    // With a goal, what was measured on the way is there, and which layers stayed float.
    let goal = ["--report", "goal.html", "--target-sqnr", "48", "--judge", "eval.npy", "--force"];
    place.run(&[&QUANTIZE[..], &goal].concat()).ok();
    let found = std::fs::read_to_string(place.path("goal.html")).unwrap();
    assert!(found.contains("Models that were measured") && found.contains("float"), "the goal's page");
    let dynamic = place.run(&[&QUANTIZE[..], &["--mode", "dynamic", "--report", "d.html", "--force"]].concat());
    assert!(dynamic.error(2).contains("static quantization alone"), "{}", dynamic.stderr);
    let Some(browser) = browser() else { return };
    used(&browser, &html, &place.path("."), ["#part3", "#part4"], false);
}
