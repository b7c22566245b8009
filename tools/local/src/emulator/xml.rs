//! Answers of the Query protocol: JSON as XML.

use serde_json::Value;

/// A member becomes an element and an item `<member>`; null is left out.
pub(crate) fn write(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Object(members) => members
            .iter()
            .filter(|(_, member)| !member.is_null())
            .map(|(name, member)| format!("<{name}>{}</{name}>", write(member)))
            .collect(),
        Value::Array(items) => items
            .iter()
            .map(|item| format!("<member>{}</member>", write(item)))
            .collect(),
        Value::String(text) => text
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;"),
        other => other.to_string(),
    }
}
