//! The SAM template: read with its intrinsic functions in their long form, and
//! evaluated for given parameters as far as that is possible before a
//! deployment.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow, bail, ensure};
use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Value, json};

/// Values of parameters.
pub type Parameters = BTreeMap<String, String>;

/// A template as it was written.
#[derive(Clone)]
pub struct Template {
    /// The file's text, for checks of comments and literals.
    pub text: String,
    root: Value,
}

/// A template for one choice of parameters: parameters, conditions and
/// `Fn::If` are replaced by what they come to; references to resources stay.
pub struct Stack {
    /// What the choice is, for messages.
    pub name: &'static str,
    resources: Map<String, Value>,
}

/// What `Ref: AWS::NoValue` leaves behind until it is taken out.
const NO_VALUE: &str = "AWS::NoValue";

/// How deep mappings and references may nest. A template is written by hand;
/// deeper is a loop.
const MAX_DEPTH: usize = 100;

impl Template {
    /// Reads a template.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let root = read_yaml(text)?;
        ensure!(
            root["Resources"].is_object(),
            "the template has no Resources"
        );
        Ok(Self {
            text: text.to_owned(),
            root,
        })
    }

    /// A part of the template as it was written, by JSON pointer.
    pub fn part(&self, pointer: &str) -> &Value {
        self.root.pointer(pointer).unwrap_or(&Value::Null)
    }

    /// The defaults of all parameters that have one.
    pub fn defaults(&self) -> Parameters {
        let mut defaults = Parameters::new();
        for (name, parameter) in self.part("/Parameters").as_object().into_iter().flatten() {
            match &parameter["Default"] {
                Value::Null => {}
                Value::String(text) => {
                    defaults.insert(name.clone(), text.clone());
                }
                other => {
                    defaults.insert(name.clone(), other.to_string());
                }
            }
        }
        defaults
    }

    /// The template for `parameters` over the defaults.
    pub fn evaluate(
        &self,
        name: &'static str,
        parameters: &[(&str, &str)],
    ) -> anyhow::Result<Stack> {
        let mut values = self.defaults();
        for (parameter, value) in parameters {
            ensure!(
                self.part("/Parameters").get(*parameter).is_some(),
                "the template has no parameter {parameter}"
            );
            values.insert((*parameter).to_owned(), (*value).to_owned());
        }
        let evaluation = Evaluation {
            root: &self.root,
            values,
        };
        let mut resources = Map::new();
        for (id, resource) in self.part("/Resources").as_object().into_iter().flatten() {
            if let Some(condition) = resource["Condition"].as_str()
                && !evaluation.condition(condition, 0)?
            {
                continue;
            }
            let mut evaluated = evaluation
                .resolve(resource, 0)
                .with_context(|| format!("resource {id}"))?;
            evaluation.add_globals(&mut evaluated)?;
            resources.insert(id.clone(), evaluated);
        }
        Ok(Stack { name, resources })
    }
}

impl Stack {
    /// Ids and definitions of the resources of a type.
    pub fn of_type<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.resources
            .iter()
            .filter(move |(_, resource)| resource["Type"] == kind)
            .map(|(id, resource)| (id.as_str(), &resource["Properties"]))
    }

    /// All resources: id, type and properties.
    pub fn all(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        self.resources.iter().map(|(id, resource)| {
            let kind = resource["Type"].as_str().unwrap_or_default();
            (id.as_str(), kind, &resource["Properties"])
        })
    }

    /// A resource's properties; null when there is none of that id.
    pub fn properties(&self, id: &str) -> &Value {
        self.resources
            .get(id)
            .map_or(&Value::Null, |resource| &resource["Properties"])
    }
}

/// The logical id that a value refers to (`Ref`, `Fn::GetAtt`, or a
/// `Fn::Sub` that is nothing else).
pub fn referred(value: &Value) -> Option<&str> {
    if let Some(id) = value["Ref"].as_str() {
        return Some(id);
    }
    if let Some(id) = value["Fn::GetAtt"][0].as_str() {
        return Some(id);
    }
    let inner = value["Fn::Sub"]
        .as_str()?
        .strip_prefix("${")?
        .strip_suffix('}')?;
    inner.split('.').next()
}

/// A number that may be written as a string.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

/// A value or a list of values, as a list.
pub fn list(value: &Value) -> Vec<&Value> {
    match value {
        Value::Null => Vec::new(),
        Value::Array(items) => items.iter().collect(),
        one => vec![one],
    }
}

struct Evaluation<'a> {
    root: &'a Value,
    values: Parameters,
}

impl Evaluation<'_> {
    fn condition(&self, name: &str, depth: usize) -> anyhow::Result<bool> {
        let definition = &self.root["Conditions"][name];
        ensure!(!definition.is_null(), "there is no condition {name}");
        self.truth(definition, depth + 1)
    }

    fn truth(&self, definition: &Value, depth: usize) -> anyhow::Result<bool> {
        ensure!(
            depth < MAX_DEPTH,
            "conditions refer to each other in a circle"
        );
        if let Some(name) = definition["Condition"].as_str() {
            return self.condition(name, depth);
        }
        if let Some([left, right]) = definition["Fn::Equals"].as_array().map(Vec::as_slice) {
            let left = self.resolve(left, depth + 1)?;
            let right = self.resolve(right, depth + 1)?;
            return Ok(text_of(&left) == text_of(&right));
        }
        if let Some([inner]) = definition["Fn::Not"].as_array().map(Vec::as_slice) {
            return Ok(!self.truth(inner, depth + 1)?);
        }
        for (function, wanted) in [("Fn::Or", true), ("Fn::And", false)] {
            for inner in definition[function].as_array().into_iter().flatten() {
                if self.truth(inner, depth + 1)? == wanted {
                    return Ok(wanted);
                }
            }
            if definition[function].is_array() {
                return Ok(!wanted);
            }
        }
        bail!("a condition of an unknown form: {definition}")
    }

    fn resolve(&self, value: &Value, depth: usize) -> anyhow::Result<Value> {
        ensure!(depth < MAX_DEPTH, "the template nests too deeply");
        match value {
            Value::Array(items) => {
                let mut resolved = Vec::new();
                for item in items {
                    let item = self.resolve(item, depth + 1)?;
                    if !is_no_value(&item) {
                        resolved.push(item);
                    }
                }
                Ok(Value::Array(resolved))
            }
            Value::Object(entries) if entries.len() == 1 => {
                let (name, argument) = entries.iter().next().expect("one entry");
                self.resolve_function(name, argument, depth)
            }
            Value::Object(entries) => self.resolve_entries(entries, depth),
            scalar => Ok(scalar.clone()),
        }
    }

    fn resolve_entries(&self, entries: &Map<String, Value>, depth: usize) -> anyhow::Result<Value> {
        let mut resolved = Map::new();
        for (name, entry) in entries {
            let entry = self.resolve(entry, depth + 1)?;
            if !is_no_value(&entry) {
                resolved.insert(name.clone(), entry);
            }
        }
        Ok(Value::Object(resolved))
    }

    fn resolve_function(
        &self,
        name: &str,
        argument: &Value,
        depth: usize,
    ) -> anyhow::Result<Value> {
        match (name, argument) {
            ("Ref", Value::String(target)) => Ok(self.values.get(target).map_or_else(
                || json!({ "Ref": target }),
                |value| Value::String(value.clone()),
            )),
            ("Fn::If", Value::Array(parts)) => {
                let [condition, yes, no] = parts.as_slice() else {
                    bail!("Fn::If takes a condition and two values");
                };
                let condition = condition.as_str().context("Fn::If names no condition")?;
                let chosen = if self.condition(condition, depth)? {
                    yes
                } else {
                    no
                };
                self.resolve(chosen, depth + 1)
            }
            ("Fn::FindInMap", Value::Array(parts)) => {
                let mut found = &self.root["Mappings"];
                for part in parts {
                    let key = text_of(&self.resolve(part, depth + 1)?);
                    found = &found[key.as_str()];
                }
                ensure!(!found.is_null(), "Fn::FindInMap finds nothing: {argument}");
                Ok(found.clone())
            }
            ("Fn::Sub", Value::String(pattern)) => self.substitute(pattern, &Map::new(), depth),
            ("Fn::Sub", Value::Array(parts)) => {
                let [Value::String(pattern), Value::Object(names)] = parts.as_slice() else {
                    bail!("Fn::Sub takes a pattern and a mapping");
                };
                self.substitute(pattern, names, depth)
            }
            _ => {
                let argument = self.resolve(argument, depth + 1)?;
                if is_no_value(&argument) {
                    return Ok(Value::Object(Map::new()));
                }
                Ok(json!({ name: argument }))
            }
        }
    }

    /// Puts in what is known; a pattern without anything unknown becomes text.
    fn substitute(
        &self,
        pattern: &str,
        names: &Map<String, Value>,
        depth: usize,
    ) -> anyhow::Result<Value> {
        let mut text = String::new();
        let mut is_complete = true;
        let mut rest = pattern;
        while let Some(start) = rest.find("${") {
            let (before, from) = rest.split_at(start);
            text.push_str(before);
            let end = from
                .find('}')
                .ok_or_else(|| anyhow!("Fn::Sub: {pattern:?} has an open brace"))?;
            let name = &from[2..end];
            rest = &from[end + 1..];
            if let Some(value) = names.get(name) {
                match self.resolve(value, depth + 1)? {
                    Value::String(value) => text.push_str(&value),
                    Value::Object(value) if value.contains_key("Fn::Sub") => {
                        is_complete = false;
                        text.push_str(value["Fn::Sub"].as_str().unwrap_or_default());
                    }
                    other => {
                        is_complete = false;
                        let target = referred(&other).unwrap_or(name);
                        text.push_str(&format!("${{{target}}}"));
                    }
                }
            } else if let Some(value) = self.values.get(name) {
                text.push_str(value);
            } else {
                is_complete = false;
                text.push_str(&format!("${{{name}}}"));
            }
        }
        text.push_str(rest);
        if is_complete {
            return Ok(Value::String(text));
        }
        Ok(json!({ "Fn::Sub": text }))
    }

    /// SAM's `Globals` apply to every function that does not say otherwise.
    fn add_globals(&self, resource: &mut Value) -> anyhow::Result<()> {
        if resource["Type"] != "AWS::Serverless::Function" {
            return Ok(());
        }
        let globals = self.resolve(&self.root["Globals"]["Function"], 0)?;
        for (name, value) in globals.as_object().into_iter().flatten() {
            if resource["Properties"][name].is_null() {
                resource["Properties"][name] = value.clone();
            }
        }
        Ok(())
    }
}

fn is_no_value(value: &Value) -> bool {
    value["Ref"] == NO_VALUE
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What is being read: a list or a mapping with the key that waits for its
/// value, and the tag it carries.
struct Open {
    tag: Option<String>,
    kind: OpenKind,
}

enum OpenKind {
    List(Vec<Value>),
    Mapping(Map<String, Value>, Option<String>),
}

pub(crate) fn read_yaml(text: &str) -> anyhow::Result<Value> {
    let mut open: Vec<Open> = Vec::new();
    let mut root = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| anyhow!("the template is no YAML: {error}"))?;
        let line = span.start.line();
        let finished = match event {
            Event::SequenceStart(_, tag) => {
                let tag = tag.map(|tag| tag.suffix.clone());
                open.push(Open {
                    tag,
                    kind: OpenKind::List(Vec::new()),
                });
                continue;
            }
            Event::MappingStart(_, tag) => {
                let tag = tag.map(|tag| tag.suffix.clone());
                open.push(Open {
                    tag,
                    kind: OpenKind::Mapping(Map::new(), None),
                });
                continue;
            }
            Event::Scalar(content, style, _, tag) => {
                let value = if style == ScalarStyle::Plain && tag.is_none() {
                    plain(&content)
                } else {
                    Value::String(content.into_owned())
                };
                tagged(tag.map(|tag| tag.suffix.clone()), value)
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let ended = open.pop().context("a YAML end without a start")?;
                let value = match ended.kind {
                    OpenKind::List(items) => Value::Array(items),
                    OpenKind::Mapping(entries, _) => Value::Object(entries),
                };
                tagged(ended.tag, value)
            }
            Event::Alias(_) => bail!("line {line}: CloudFormation knows no YAML aliases"),
            _ => continue,
        };
        match open.last_mut().map(|open| &mut open.kind) {
            None => root = Some(finished),
            Some(OpenKind::List(items)) => items.push(finished),
            Some(OpenKind::Mapping(entries, waiting)) => match waiting.take() {
                None => *waiting = Some(text_of(&finished)),
                Some(key) => {
                    ensure!(
                        !entries.contains_key(&key),
                        "line {line}: {key} is there twice"
                    );
                    entries.insert(key, finished);
                }
            },
        }
    }
    root.context("the template is empty")
}

/// `!Sub x` is `{"Fn::Sub": x}`, and so on.
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

fn plain(content: &str) -> Value {
    match content {
        "" | "~" | "null" => Value::Null,
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        _ => {
            if let Ok(integer) = content.parse::<i64>() {
                return json!(integer);
            }
            let is_decimal = content.starts_with(|first: char| first.is_ascii_digit());
            match content.parse::<f64>() {
                Ok(decimal) if is_decimal => json!(decimal),
                _ => Value::String(content.to_owned()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
Parameters:
  Kind: { Type: String, Default: a }
  Days: { Type: Number, Default: 2 }
Mappings:
  Seconds: { "1": { S: 86400 }, "2": { S: 172800 } }
Conditions:
  IsA: !Equals [!Ref Kind, a]
  IsOther: !Not [!Condition IsA]
  Either: !Or [!Condition IsA, !Equals [!Ref Days, "9"]]
Resources:
  One:
    Type: T
    Properties:
      Always: !If [IsA, !Ref Two, !Ref AWS::NoValue]
      Text: !Sub "${Kind}-${Two.Arn}-${AWS::Region}"
      Known: !Sub ["${X}/${Days}", { X: !Ref Kind }]
      Life: !FindInMap [Seconds, !Ref Days, S]
      List: [!If [IsOther, x, !Ref AWS::NoValue], !GetAtt Two.Arn]
  Two:
    Type: T
    Condition: Either
    Properties: { Date: 2012-10-17, Yes: true, Quoted: "5" }
"#;

    #[test]
    fn parameters_conditions_and_maps_are_put_in() {
        let stack = Template::parse(SMALL).unwrap().evaluate("a", &[]).unwrap();
        assert_eq!(
            stack.properties("One"),
            &json!({
                "Always": {"Ref": "Two"},
                "Text": {"Fn::Sub": "a-${Two.Arn}-${AWS::Region}"},
                "Known": "a/2",
                "Life": 172800,
                "List": [{"Fn::GetAtt": ["Two", "Arn"]}],
            })
        );
        assert_eq!(
            stack.properties("Two"),
            &json!({"Date": "2012-10-17", "Yes": true, "Quoted": "5"})
        );
    }

    #[test]
    fn what_a_condition_excludes_is_gone() {
        let template = Template::parse(SMALL).unwrap();
        let stack = template
            .evaluate("b", &[("Kind", "b"), ("Days", "1")])
            .unwrap();
        assert_eq!(stack.properties("Two"), &Value::Null);
        assert_eq!(stack.properties("One").get("Always"), None);
        assert_eq!(stack.properties("One")["List"][0], "x");
        assert!(template.evaluate("c", &[("Nothing", "1")]).is_err());
    }

    #[test]
    fn aliases_and_repeated_keys_are_refused() {
        let repeated = "Resources: {}\nOutputs: { A: 1, A: 2 }\n";
        assert!(Template::parse(repeated).is_err());
        assert!(Template::parse("Resources: &x {}\nOther: *x\n").is_err());
    }
}
