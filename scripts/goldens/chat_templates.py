#!/usr/bin/env python3
"""Writes tests/goldens/chat_templates.json: conversations with the prompts that transformers makes of them.

    pip install transformers==4.57.3 jinja2==3.1.6 && python scripts/goldens/chat_templates.py

The template `smollm2` is the model's own; the others were written here, with the features of the public ones.
"""

import datetime
import json
import pathlib

import transformers
from transformers.utils import chat_template_utils as c


class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 15, 4, 9)


c.datetime = Fixed
smol = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
llama3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n" }}
{%- if tools is not none %}
    {{- "Tools:\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("only one tool call at once") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
mistral = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
        {%- if message == user_messages[-1] and tools is not none %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("only user and assistant roles are supported, not " ~ message["role"]) }}
    {%- endif %}
{%- endfor %}
"""
qwen3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
misc = """{% macro role(m) -%}
  [{{ m.role | upper }}]
{%- endmacro %}
{% for m in messages %}
    {# a comment #}
    {% if m.content == 'skip' %}{% continue %}{% endif %}
    {% if m.content == 'stop' %}{% break %}{% endif %}
{{ role(m) }} {% generation %}{{ m.content | replace('a', 'b') }}{% endgeneration %} {{ m.get('name', 'nobody') }} {{ "%s=%d" | format(loop.index, 7) }}
    {% for k, v in m | items %}{{ k }}:{{ v | tojson }};{% endfor %}

{% endfor %}
{{ [1, 2.5, true, none, "é<&>'\\""] | tojson }} {{ {'b': 1, 'a': [{}, []]} | tojson(indent=2) }} {{ {'b': 1, 'a': 'x'} | tojson(sort_keys=true) }} {{ {'b': [1,2]} | tojson(separators=(',', ':')) }}
{{ 'a,b,,c'.split(',') | join('|') }} {{ '  x '.strip() }}{{ 'Title case'.title() }} {{ 'abc'[::-1] }} {{ 'abc'[-2:] }} {{ 7 // 2 }} {{ 7 % 3 }} {{ undefined_thing }}{{ none }} {{ true }} {{ 1.0 }}
"""


def U(text, **more):
    return dict(role="user", content=text, **more)


def A(text, **more):
    return dict(role="assistant", content=text, **more)


def S(text):
    return dict(role="system", content=text)


tool = {"type": "function", "function": {"name": "weather", "description": "Tells the weather, in °C", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
conv = [
 ("smollm2", smol, [U("Hi")], {}), ("smollm2", smol, [S("Be brief."), U("Hi"), A("Hello! 😀"), U("<b> & 'c'")], {}), ("smollm2", smol, [U("Hi"), A("Hey")], {"add_generation_prompt": False}),
 ("llama3", llama3, [S("  You are kind. \n"), U(" Hi \n"), A("Hello"), U("Bye")], {}),
 ("llama3", llama3, [U("Weather?")], {"tools": [tool], "date_string": "1 Jan 2025"}),
 ("llama3", llama3, [U("Weather?"), A("", tool_calls=[call]), dict(role="tool", content={"celsius": 21.5}), A("Warm.")], {"add_generation_prompt": False}),
 ("llama3", llama3, [U("Weather?"), A("", tool_calls=[call, call])], {}),
 ("mistral", mistral, [S("Sys"), U("1"), A("2"), U("3")], {}), ("mistral", mistral, [U("1"), A("2"), U("3")], {"tools": [tool]}), ("mistral", mistral, [U("1"), U("2")], {}), ("mistral", mistral, [A("1")], {}),
 ("qwen3", qwen3, [S("Sys"), U("1"), A("<think>\nhm\n</think>\n\nyes"), U("2")], {}), ("qwen3", qwen3, [U("1")], {"enable_thinking": False}), ("qwen3", qwen3, [U("1")], {"enable_thinking": True}),
 ("qwen3", qwen3, [U("1"), A("<think>\nhm\n</think>\n\nyes")], {"add_generation_prompt": False}), ("qwen3", qwen3, [U("1"), A("call", reasoning_content="\nwhy\n"), dict(role="tool", content="r1"), dict(role="tool", content="r2")], {}),
 ("misc", misc, [U("a banana", name="Ann"), U("skip"), A("x", extra=[1, {"é": None}]), U("stop"), U("never")], {}),
]
cases = []
for name, template, messages, opts in conv:
    o = dict(opts); gen = o.pop("add_generation_prompt", True); tools = o.pop("tools", None)
    try:
        out = {"prompt": c.render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=gen, bos_token="<s>", eos_token="</s>", **o)[0][0]}
    except Exception as e:
        out = {"error": str(e)}
    cases.append(dict(template=name, messages=messages, add_generation_prompt=gen, tools=tools, variables=o, **out))
templates = {"smollm2": smol, "llama3": llama3, "mistral": mistral, "qwen3": qwen3, "misc": misc}
provenance = (
    f"transformers {transformers.__version__}, render_jinja_template, the clock at 2024-07-26 15:04:09, bos_token <s>, "
    "eos_token </s>; written by scripts/goldens/chat_templates.py"
)
with open(pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens" / "chat_templates.json", "w") as out:
    json.dump({"provenance": provenance, "templates": templates, "cases": cases}, out, ensure_ascii=False, indent=1)
    out.write("\n")
