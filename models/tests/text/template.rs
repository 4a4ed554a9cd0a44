use std::path::Path;
use std::time::{Duration, SystemTime};

use nibble_models::{ChatTemplate, Message, ModelError, RenderOptions};
use serde_json::{Map, Value, json};

fn tokens() -> Map<String, Value> {
    json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone()
}

fn template(source: &str) -> Result<ChatTemplate, ModelError> {
    ChatTemplate::new(Path::new("m/chat_template.jinja"), source, tokens())
}

fn render(source: &str) -> Result<String, ModelError> {
    template(source)?.render(&[Message::new("user", "Hi")], &RenderOptions::default())
}

#[test]
fn prompts_are_those_of_transformers() {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/goldens/chat_templates.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 12);
    for (index, case) in cases.iter().enumerate() {
        let name = case["template"].as_str().unwrap();
        let options = RenderOptions {
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            tools: Some(case["tools"].clone()).filter(|t| !t.is_null()),
            variables: case["variables"].as_object().unwrap().clone(),
            // 2024-07-26 15:04:09 UTC
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_722_006_249),
            utc_offset: 0,
        };
        let template = template(golden["templates"][name].as_str().unwrap()).unwrap();
        let found = template.render(case["messages"].as_array().unwrap(), &options);
        match (case["prompt"].as_str(), found) {
            (Some(wanted), Ok(found)) => assert_eq!(found, wanted, "case {index}, {name}"),
            (None, Err(error)) => {
                let (error, wanted) = (error.to_string(), case["error"].as_str().unwrap());
                assert!(error.contains(wanted) && error.contains("chat_template.jinja"), "case {index}: {error}");
            }
            (wanted, found) => panic!("case {index}, {name}: {found:?}, wanted {wanted:?}"),
        }
    }
}

#[test]
fn messages_keep_their_extra_fields_through_serde() {
    let value = json!({"role": "assistant", "content": "x", "reasoning_content": "why", "tool_calls": []});
    let message: Message = serde_json::from_value(value.clone()).unwrap();
    assert_eq!(serde_json::to_value(&message).unwrap(), value);
    let source = "{{ messages[0].reasoning_content }}/{{ messages[0].tool_calls | length }}";
    assert_eq!(template(source).unwrap().render(&[message], &RenderOptions::default()).unwrap(), "why/0");
}

#[test]
fn a_bad_template_is_refused_with_its_file_and_line() {
    let cases = [
        ("a\n{% if %}", "line 2"),
        ("{% for x in y %}", "line 1"),
        ("\n\n{{ messages[0].content.frobnicate() }}", "line 3"),
        ("{{ messages | nonesuch }}", "nonesuch"),
        ("{{ nonesuch() }}", "nonesuch"),
        ("{{ nonesuch.field }}", "line 1"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "no user"),
        ("{% include 'etc/passwd' %}", "etc/passwd"),
        ("{{ strftime_now('%Q') }}", "%Q"),
        ("{{ messages | tojson(color='red') }}", "color"),
    ];
    for (source, part) in cases {
        let error = render(source).unwrap_err();
        assert!(matches!(error, ModelError::Template { .. }), "{error:?}");
        let error = error.to_string();
        assert!(error.contains("m/chat_template.jinja") && error.contains(part), "{source}: {error}");
    }
}

#[test]
fn a_hostile_template_ends() {
    let cases = [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 100000000000 }}",
        "{% for a in range(90000) %}{{ 'x' * 90000000 }}{% endfor %}",
        "{% for a in range(90000) %}{{ ('x' * 9000) | replace('x', 'y' * 9000) }}{% endfor %}",
        "{% for a in range(90000) %}{{ 'x' | indent(90000000) | center(90000000) }}{% endfor %}",
        "{{ '%1000000000d' | format(1) ~ '%.1000000000f' | format(1.5) }}{% for a in range(90000) %}{{ range(90000) | join('x' * 90000) }}{% endfor %}",
        "{% for a in range(90000) %}{{ range(99999) | list | tojson }}{% endfor %}",
        "{% for a in range(90000) %}{{ messages[0].content.join(range(99999) | map('string')) }}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(90) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | length }}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(90) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{% for x in ns.l %}x{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(90) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(90) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
        "{% set ns = namespace(l=[]) %}{% for b in range(90) %}{% for a in range(9000) %}{% set ns.l = [ns.l] %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(l=[]) %}{% for a in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l | tojson }}",
        "{% set ns = namespace(l='x') %}{% for a in range(99) %}{% set ns.l = ns.l | replace('x', 'xx') | upper | lower %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(d={}) %}{% for a in range(90) %}{% set ns.d = dict(ns.d, a=ns.d, b=ns.d) %}{% endfor %}{{ ns.d | tojson }}",
        "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for a in range(90) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    ];
    for source in cases {
        assert!(matches!(render(source), Err(ModelError::Template { .. })), "{source}");
    }
    let deep = format!("{}x{}", "{% if true %}".repeat(5000), "{% endif %}".repeat(5000));
    assert!(matches!(render(&deep), Err(ModelError::Template { .. })));
    let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
    assert!(matches!(render(&brackets), Err(ModelError::Template { .. })));
    assert!(matches!(render(&"x".repeat(2 << 20)), Err(ModelError::Template { .. })));
}

#[test]
fn a_long_conversation_is_within_the_limits() {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/goldens/chat_templates.json")).unwrap();
    let messages: Vec<Message> = (0..1000)
        .map(|i| Message::new(if i % 2 == 0 { "user" } else { "assistant" }, "words and words. ".repeat(100)))
        .collect();
    for name in ["smollm2", "llama3", "qwen3"] {
        let template = template(golden["templates"][name].as_str().unwrap()).unwrap();
        let prompt = template.render(&messages, &RenderOptions::default()).unwrap();
        assert!(prompt.len() > 1_600_000, "{name}: {}", prompt.len());
    }
}

#[test]
fn the_template_is_found_where_transformers_looks() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let load = || ChatTemplate::load(folder.path());
    let say =
        |options: &RenderOptions| load().unwrap().unwrap().render(&[Message::new("user", "Hi")], options).unwrap();
    let plain = RenderOptions::default();
    assert!(load().unwrap().is_none());

    write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"}"#);
    assert!(load().unwrap().is_none());

    let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}1{{ eos_token }}"});
    write("tokenizer_config.json", &config.to_string());
    assert_eq!(say(&plain), "<s>1</s>");

    let named =
        json!({"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]});
    write("tokenizer_config.json", &named.to_string());
    assert_eq!(say(&plain), "plain");
    assert_eq!(say(&RenderOptions { tools: Some(json!([{}])), ..plain.clone() }), "tools");

    write("chat_template.jinja", "file\n");
    assert_eq!(say(&plain), "file");

    write("chat_template.jinja", "{% bad");
    assert!(load().unwrap_err().to_string().contains("chat_template.jinja"));
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    write("tokenizer_config.json", r#"{"chat_template": 5}"#);
    assert!(load().unwrap_err().to_string().contains("chat_template"));
    write("tokenizer_config.json", r#"{"chat_template": []}"#);
    assert!(load().unwrap_err().to_string().contains("empty"));
}
