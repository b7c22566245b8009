//! YAML with CloudFormation's tags as JSON: `!Sub x` becomes `{"Fn::Sub": x}`.
//! JSON is YAML, so synthesised templates are read by the same rules.

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Value, json};

use crate::{TemplateError, text_of};

struct Open {
    tag: Option<String>,
    content: Content,
}

enum Content {
    List(Vec<Value>),
    /// With the key that waits for its value.
    Mapping(Map<String, Value>, Option<String>),
}

/// Reads one document.
pub fn read_yaml(text: &str) -> Result<Value, TemplateError> {
    let mut open: Vec<Open> = Vec::new();
    let mut root = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| TemplateError::Yaml(error.to_string()))?;
        let wrong = |what: &str| TemplateError::Yaml(format!("line {}: {what}", span.start.line()));
        let finished = match event {
            Event::Scalar(text, style, _, tag) => {
                let value = match style {
                    ScalarStyle::Plain if tag.is_none() => plain(&text),
                    _ => json!(text),
                };
                tagged(name_of(tag.as_deref()), value)
            }
            Event::SequenceStart(_, tag) => {
                let (tag, content) = (name_of(tag.as_deref()), Content::List(Vec::new()));
                open.push(Open { tag, content });
                continue;
            }
            Event::MappingStart(_, tag) => {
                let content = Content::Mapping(Map::new(), None);
                let tag = name_of(tag.as_deref());
                open.push(Open { tag, content });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open {
                    tag,
                    content: Content::List(items),
                }) => tagged(tag, json!(items)),
                Some(Open {
                    tag,
                    content: Content::Mapping(members, _),
                }) => tagged(tag, Value::Object(members)),
                None => continue,
            },
            Event::Alias(_) => return Err(wrong("CloudFormation knows no YAML aliases")),
            _ => continue,
        };
        match open.last_mut().map(|open| &mut open.content) {
            None => root = Some(finished),
            Some(Content::List(items)) => items.push(finished),
            Some(Content::Mapping(members, waiting)) => match waiting.take() {
                None => *waiting = Some(text_of(&finished)),
                Some(key) if members.contains_key(&key) => {
                    return Err(wrong(&format!("{key} is there twice")));
                }
                Some(key) => {
                    members.insert(key, finished);
                }
            },
        }
    }
    root.ok_or_else(|| TemplateError::Yaml("it is empty".to_owned()))
}

fn name_of(tag: Option<&Tag>) -> Option<String> {
    tag.filter(|tag| tag.handle == "!")
        .map(|tag| tag.suffix.clone())
}

fn tagged(tag: Option<String>, value: Value) -> Value {
    match (tag.as_deref(), value) {
        (None, value) => value,
        (Some(name @ ("Ref" | "Condition")), value) => json!({ name: value }),
        (Some("GetAtt"), Value::String(path)) => {
            let (id, attribute) = path.split_once('.').unwrap_or((&path, ""));
            json!({ "Fn::GetAtt": [id, attribute] })
        }
        (Some(name), value) => json!({ format!("Fn::{name}"): value }),
    }
}

/// YAML's core schema for plain scalars.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return json!(true),
        "false" | "False" | "FALSE" => return json!(false),
        _ => {}
    }
    // JSON's numbers are the ones: 000000000000 is an account, 2012-10-17 a date.
    match serde_json::from_str(text) {
        Ok(number @ Value::Number(_)) => number,
        _ => json!(text),
    }
}
