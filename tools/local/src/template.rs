//! Reading the SAM template: YAML with CloudFormation's tags, then parameters,
//! conditions and intrinsic functions resolved as CloudFormation would.
//!
//! What the local deployment sets (queue attributes, environments, filters,
//! patterns) comes from here and from nowhere else.

use std::{collections::BTreeMap, collections::BTreeSet};

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Value, json};
use thiserror::Error;

/// What is wrong with a template or its parameters.
#[derive(Debug, Error, PartialEq)]
pub enum TemplateError {
    /// Not YAML.
    #[error("the template is not valid YAML: {0}")]
    Yaml(String),
    /// A parameter without a default was not given.
    #[error("parameter {0} has no default and was not given")]
    MissingParameter(String),
    /// A parameter that the template does not have.
    #[error("the template has no parameter {0}")]
    UnknownParameter(String),
    /// A value outside of what the parameter accepts.
    #[error("parameter {name} is {value:?}: {accepted}")]
    ParameterValue {
        /// The parameter.
        name: String,
        /// What was given.
        value: String,
        /// What it accepts.
        accepted: String,
    },
    /// Something that is referred to and not there.
    #[error("{place}: {name} is neither a parameter nor a resource")]
    UnknownReference {
        /// Where.
        place: String,
        /// What.
        name: String,
    },
    /// A function that is malformed or not known here.
    #[error("{place}: cannot resolve {function}")]
    Function {
        /// Where.
        place: String,
        /// Which.
        function: String,
    },
}

/// Answers what CloudFormation would know of a resource once it exists.
pub trait PhysicalIds {
    /// What `!Ref` gives.
    fn reference(&self, logical_id: &str, kind: &str) -> String;
    /// What `!GetAtt` gives.
    fn attribute(&self, logical_id: &str, kind: &str, attribute: &str) -> String;
    /// `AWS::Region`, `AWS::AccountId` and so on, without `AWS::`.
    fn pseudo(&self, name: &str) -> Option<String>;
}

/// A template as written, intrinsic functions in their long form.
#[derive(Debug, Clone)]
pub struct Template {
    document: Value,
}

/// A resource with everything resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Such as `AWS::SQS::Queue`.
    pub kind: String,
    /// Its properties; what was `AWS::NoValue` is absent.
    pub properties: Value,
    /// Its metadata, resolved.
    pub metadata: Value,
}

/// Every resource whose condition holds, by logical id.
#[derive(Debug, Clone, Default)]
pub struct Stack {
    /// The resources.
    pub resources: BTreeMap<String, Resource>,
    /// The parameters' values.
    pub parameters: BTreeMap<String, String>,
}

impl Stack {
    /// The resources of a kind, with their logical ids.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a Resource)> {
        self.resources
            .iter()
            .filter(move |(_, resource)| resource.kind == kind)
            .map(|(id, resource)| (id.as_str(), resource))
    }
}

impl Template {
    /// Reads a template's text.
    ///
    /// # Errors
    /// When it is not YAML.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        Ok(Self {
            document: read_yaml(text)?,
        })
    }

    /// The whole document, with intrinsic functions in their long form.
    #[must_use]
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// Resolves the template for these parameters.
    ///
    /// # Errors
    /// When a parameter is missing, unknown or not accepted, or a reference
    /// leads nowhere.
    pub fn resolve(
        &self,
        overrides: &BTreeMap<String, String>,
        ids: &dyn PhysicalIds,
    ) -> Result<Stack, TemplateError> {
        let parameters = self.parameters(overrides)?;
        let empty = Map::new();
        let resources = self.document["Resources"].as_object().unwrap_or(&empty);
        let resolver = Resolver {
            template: self,
            parameters: &parameters,
            resources,
            ids,
        };
        let mut stack = Stack {
            resources: BTreeMap::new(),
            parameters: parameters.clone(),
        };
        for (logical_id, resource) in resources {
            if let Some(condition) = resource["Condition"].as_str()
                && !resolver.condition(condition, logical_id)?
            {
                continue;
            }
            let kind = resource["Type"].as_str().unwrap_or_default().to_owned();
            let properties = resolver
                .resolve(&resource["Properties"], logical_id)?
                .unwrap_or(Value::Null);
            let metadata = resolver
                .resolve(&resource["Metadata"], logical_id)?
                .unwrap_or(Value::Null);
            let properties = self.with_globals(&kind, properties, &resolver)?;
            stack.resources.insert(
                logical_id.clone(),
                Resource {
                    kind,
                    properties,
                    metadata,
                },
            );
        }
        Ok(stack)
    }

    fn parameters(
        &self,
        overrides: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<String, String>, TemplateError> {
        let empty = Map::new();
        let declared = self.document["Parameters"].as_object().unwrap_or(&empty);
        if let Some(unknown) = overrides.keys().find(|name| !declared.contains_key(*name)) {
            return Err(TemplateError::UnknownParameter(unknown.clone()));
        }
        let mut values = BTreeMap::new();
        for (name, declaration) in declared {
            let value = match (overrides.get(name), &declaration["Default"]) {
                (Some(value), _) => value.clone(),
                (None, Value::Null) => return Err(TemplateError::MissingParameter(name.clone())),
                (None, default) => text_of(default),
            };
            check_parameter(name, &value, declaration)?;
            values.insert(name.clone(), value);
        }
        Ok(values)
    }

    /// SAM's `Globals.Function`, under what a function says itself.
    fn with_globals(
        &self,
        kind: &str,
        properties: Value,
        resolver: &Resolver<'_>,
    ) -> Result<Value, TemplateError> {
        if kind != "AWS::Serverless::Function" {
            return Ok(properties);
        }
        let globals = resolver.resolve(&self.document["Globals"]["Function"], "Globals")?;
        let (Some(Value::Object(mut merged)), Value::Object(own)) = (globals, &properties) else {
            return Ok(properties);
        };
        for (name, value) in own {
            let both = (merged.get_mut(name), value);
            if let (Some(Value::Object(global)), Value::Object(own)) = both {
                merge(global, own);
            } else {
                merged.insert(name.clone(), value.clone());
            }
        }
        Ok(Value::Object(merged))
    }
}

fn merge(under: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (name, value) in over {
        match (under.get_mut(name), value) {
            (Some(Value::Object(under)), Value::Object(over)) => merge(under, over),
            _ => {
                under.insert(name.clone(), value.clone());
            }
        }
    }
}

fn check_parameter(name: &str, value: &str, declaration: &Value) -> Result<(), TemplateError> {
    let refused = |accepted: String| TemplateError::ParameterValue {
        name: name.to_owned(),
        value: value.to_owned(),
        accepted,
    };
    if let Some(allowed) = declaration["AllowedValues"].as_array() {
        let allowed: Vec<String> = allowed.iter().map(text_of).collect();
        if !allowed.iter().any(|one| one == value) {
            return Err(refused(format!(
                "one of {} is accepted",
                allowed.join(", ")
            )));
        }
    }
    if declaration["Type"] == json!("Number") {
        let number: f64 = value
            .parse()
            .map_err(|_| refused("a number is accepted".to_owned()))?;
        if declaration["MinValue"]
            .as_f64()
            .is_some_and(|least| number < least)
        {
            return Err(refused(format!(
                "at least {} is accepted",
                declaration["MinValue"]
            )));
        }
        if declaration["MaxValue"]
            .as_f64()
            .is_some_and(|most| number > most)
        {
            return Err(refused(format!(
                "at most {} is accepted",
                declaration["MaxValue"]
            )));
        }
    }
    Ok(())
}

/// A scalar as CloudFormation hands it on: everything becomes text.
pub(crate) fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

struct Resolver<'a> {
    template: &'a Template,
    parameters: &'a BTreeMap<String, String>,
    resources: &'a Map<String, Value>,
    ids: &'a dyn PhysicalIds,
}

impl Resolver<'_> {
    /// The value with its functions carried out; none for `AWS::NoValue`.
    fn resolve(&self, value: &Value, place: &str) -> Result<Option<Value>, TemplateError> {
        match value {
            Value::Array(items) => {
                let mut resolved = Vec::with_capacity(items.len());
                for item in items {
                    resolved.extend(self.resolve(item, place)?);
                }
                Ok(Some(Value::Array(resolved)))
            }
            Value::Object(members) => {
                if let Some((name, argument)) = only_member(members)
                    && (name == "Ref" || name == "Condition" || name.starts_with("Fn::"))
                    && !(name == "Condition" && argument.is_object())
                {
                    return self.function(name, argument, place);
                }
                let mut resolved = Map::new();
                for (name, member) in members {
                    let inner = format!("{place}.{name}");
                    if let Some(member) = self.resolve(member, &inner)? {
                        resolved.insert(name.clone(), member);
                    }
                }
                Ok(Some(Value::Object(resolved)))
            }
            scalar => Ok(Some(scalar.clone())),
        }
    }

    fn function(
        &self,
        name: &str,
        argument: &Value,
        place: &str,
    ) -> Result<Option<Value>, TemplateError> {
        let wrong = || TemplateError::Function {
            place: place.to_owned(),
            function: format!("{name} {argument}"),
        };
        match name {
            "Ref" => {
                let target = argument.as_str().ok_or_else(wrong)?;
                if target == "AWS::NoValue" {
                    return Ok(None);
                }
                Ok(Some(json!(self.reference(target, place)?)))
            }
            "Fn::GetAtt" => {
                let parts: Vec<&str> = match argument {
                    Value::String(text) => text.splitn(2, '.').collect(),
                    Value::Array(items) => items.iter().filter_map(Value::as_str).collect(),
                    _ => return Err(wrong()),
                };
                let [target, attribute] = parts[..] else {
                    return Err(wrong());
                };
                Ok(Some(json!(self.attribute(target, attribute, place)?)))
            }
            "Fn::Sub" => self
                .substitute(argument, place)
                .map(|text| Some(json!(text))),
            "Fn::If" => {
                let [condition, yes, no] = &argument.as_array().ok_or_else(wrong)?[..] else {
                    return Err(wrong());
                };
                let holds = self.condition(condition.as_str().ok_or_else(wrong)?, place)?;
                self.resolve(if holds { yes } else { no }, place)
            }
            "Fn::Join" => {
                let [separator, items] = &argument.as_array().ok_or_else(wrong)?[..] else {
                    return Err(wrong());
                };
                let items = self.texts(items, place)?;
                Ok(Some(json!(
                    items.join(separator.as_str().ok_or_else(wrong)?)
                )))
            }
            "Fn::Select" => {
                let [index, items] = &argument.as_array().ok_or_else(wrong)?[..] else {
                    return Err(wrong());
                };
                let index: usize = text_of(index).parse().map_err(|_| wrong())?;
                let items = self.resolve(items, place)?.ok_or_else(wrong)?;
                items.get(index).cloned().map(Some).ok_or_else(wrong)
            }
            "Fn::Split" => {
                let [separator, text] = &argument.as_array().ok_or_else(wrong)?[..] else {
                    return Err(wrong());
                };
                let text = text_of(&self.resolve(text, place)?.ok_or_else(wrong)?);
                let parts: Vec<&str> = text.split(separator.as_str().ok_or_else(wrong)?).collect();
                Ok(Some(json!(parts)))
            }
            "Fn::FindInMap" => {
                let keys = self.texts(argument, place)?;
                let [map, first, second] = &keys[..] else {
                    return Err(wrong());
                };
                let found = &self.template.document["Mappings"][map.as_str()][first.as_str()]
                    [second.as_str()];
                if found.is_null() {
                    Err(wrong())
                } else {
                    Ok(Some(found.clone()))
                }
            }
            "Fn::Equals" | "Fn::And" | "Fn::Or" | "Fn::Not" | "Condition" => {
                Ok(Some(json!(self.holds(&json!({ name: argument }), place)?)))
            }
            "Fn::GetAZs" => {
                let region = self.ids.pseudo("Region").unwrap_or_default();
                Ok(Some(json!([
                    format!("{region}a"),
                    format!("{region}b"),
                    format!("{region}c")
                ])))
            }
            "Fn::Base64" => self.resolve(argument, place),
            "Fn::ToJsonString" => {
                let value = self.resolve(argument, place)?.ok_or_else(wrong)?;
                Ok(Some(json!(value.to_string())))
            }
            _ => Err(wrong()),
        }
    }

    fn texts(&self, items: &Value, place: &str) -> Result<Vec<String>, TemplateError> {
        let resolved = self.resolve(items, place)?.unwrap_or_default();
        Ok(resolved
            .as_array()
            .into_iter()
            .flatten()
            .map(text_of)
            .collect())
    }

    fn reference(&self, target: &str, place: &str) -> Result<String, TemplateError> {
        let unknown = || TemplateError::UnknownReference {
            place: place.to_owned(),
            name: target.to_owned(),
        };
        if let Some(pseudo) = target.strip_prefix("AWS::") {
            return self.ids.pseudo(pseudo).ok_or_else(unknown);
        }
        if let Some(value) = self.parameters.get(target) {
            return Ok(value.clone());
        }
        let resource = self.resources.get(target).ok_or_else(unknown)?;
        Ok(self
            .ids
            .reference(target, resource["Type"].as_str().unwrap_or_default()))
    }

    fn attribute(
        &self,
        target: &str,
        attribute: &str,
        place: &str,
    ) -> Result<String, TemplateError> {
        let unknown = || TemplateError::UnknownReference {
            place: place.to_owned(),
            name: target.to_owned(),
        };
        let resource = self.resources.get(target).ok_or_else(unknown)?;
        Ok(self.ids.attribute(
            target,
            resource["Type"].as_str().unwrap_or_default(),
            attribute,
        ))
    }

    /// `${Name}`, `${Name.Attribute}`, `${!literal}`, and names of its own map.
    fn substitute(&self, argument: &Value, place: &str) -> Result<String, TemplateError> {
        let wrong = || TemplateError::Function {
            place: place.to_owned(),
            function: format!("Fn::Sub {argument}"),
        };
        let (text, own) = match argument {
            Value::String(text) => (text.as_str(), None),
            Value::Array(items) => (
                items.first().and_then(Value::as_str).ok_or_else(wrong)?,
                items.get(1).and_then(Value::as_object),
            ),
            _ => return Err(wrong()),
        };
        let mut result = String::new();
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            result.push_str(&rest[..start]);
            let end = rest[start..].find('}').ok_or_else(wrong)? + start;
            let name = &rest[start + 2..end];
            rest = &rest[end + 1..];
            if let Some(literal) = name.strip_prefix('!') {
                result.push_str(&format!("${{{literal}}}"));
                continue;
            }
            let name = name.trim();
            if let Some(value) = own.and_then(|own| own.get(name)) {
                result.push_str(&text_of(&self.resolve(value, place)?.unwrap_or_default()));
                continue;
            }
            let value = match name.split_once('.') {
                Some((target, attribute)) => self.attribute(target, attribute, place)?,
                None => self.reference(name, place)?,
            };
            result.push_str(&value);
        }
        result.push_str(rest);
        Ok(result)
    }

    fn condition(&self, name: &str, place: &str) -> Result<bool, TemplateError> {
        let condition = &self.template.document["Conditions"][name];
        if condition.is_null() {
            return Err(TemplateError::UnknownReference {
                place: place.to_owned(),
                name: name.to_owned(),
            });
        }
        self.holds(condition, name)
    }

    fn holds(&self, condition: &Value, place: &str) -> Result<bool, TemplateError> {
        let wrong = || TemplateError::Function {
            place: place.to_owned(),
            function: condition.to_string(),
        };
        let (name, argument) = condition
            .as_object()
            .and_then(only_member)
            .ok_or_else(wrong)?;
        let all = || -> Result<Vec<bool>, TemplateError> {
            argument
                .as_array()
                .ok_or_else(wrong)?
                .iter()
                .map(|one| self.holds(one, place))
                .collect()
        };
        match name {
            "Fn::Equals" => {
                let [left, right] = &argument.as_array().ok_or_else(wrong)?[..] else {
                    return Err(wrong());
                };
                let text = |value| -> Result<String, TemplateError> {
                    Ok(text_of(&self.resolve(value, place)?.unwrap_or_default()))
                };
                Ok(text(left)? == text(right)?)
            }
            "Fn::Not" => all()?.first().map(|first| !first).ok_or_else(wrong),
            "Fn::And" => Ok(all()?.into_iter().all(|one| one)),
            "Fn::Or" => Ok(all()?.into_iter().any(|one| one)),
            "Condition" => self.condition(argument.as_str().ok_or_else(wrong)?, place),
            _ => Err(wrong()),
        }
    }
}

fn only_member(members: &Map<String, Value>) -> Option<(&str, &Value)> {
    let mut all = members.iter();
    let (name, value) = all.next()?;
    all.next().is_none().then_some((name.as_str(), value))
}

// -------------------------------------------------------------------- YAML --

/// What is being read: a list, or a mapping with the key that awaits its value.
enum Open {
    List(Vec<Value>, Option<String>),
    Mapping(Map<String, Value>, Option<String>, Option<String>),
}

fn read_yaml(text: &str) -> Result<Value, TemplateError> {
    let mut open: Vec<Open> = Vec::new();
    let mut root = Value::Null;
    // CloudFormation has no anchors of its own; the few who use YAML's are told.
    let mut aliases: BTreeSet<usize> = BTreeSet::new();
    for step in Parser::new_from_str(text) {
        let (event, _) = step.map_err(|error| TemplateError::Yaml(error.to_string()))?;
        let finished = match event {
            Event::Scalar(text, style, _, tag) => {
                Some(tagged(scalar(&text, style), tag.as_deref()))
            }
            Event::SequenceStart(_, tag) => {
                open.push(Open::List(Vec::new(), tag_name(tag.as_deref())));
                None
            }
            Event::MappingStart(_, tag) => {
                open.push(Open::Mapping(Map::new(), None, tag_name(tag.as_deref())));
                None
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(items, tag)) => Some(with_tag(Value::Array(items), tag)),
                Some(Open::Mapping(members, _, tag)) => Some(with_tag(Value::Object(members), tag)),
                None => None,
            },
            Event::Alias(anchor) => {
                aliases.insert(anchor);
                None
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => None,
        };
        let Some(value) = finished else { continue };
        match open.last_mut() {
            None => root = value,
            Some(Open::List(items, _)) => items.push(value),
            Some(Open::Mapping(members, key, _)) => match key.take() {
                None => *key = Some(text_of(&value)),
                Some(name) => {
                    members.insert(name, value);
                }
            },
        }
    }
    if aliases.is_empty() {
        Ok(root)
    } else {
        Err(TemplateError::Yaml(
            "aliases (*name) are not read here".to_owned(),
        ))
    }
}

fn tag_name(tag: Option<&Tag>) -> Option<String> {
    tag.filter(|tag| tag.handle == "!")
        .map(|tag| tag.suffix.clone())
}

fn tagged(value: Value, tag: Option<&Tag>) -> Value {
    with_tag(value, tag_name(tag))
}

/// `!Ref x` is `{"Ref": "x"}`, `!Sub x` is `{"Fn::Sub": "x"}`.
fn with_tag(value: Value, tag: Option<String>) -> Value {
    match tag.as_deref() {
        None => value,
        Some(name @ ("Ref" | "Condition")) => json!({ name: value }),
        Some(name) => json!({ format!("Fn::{name}"): value }),
    }
}

/// YAML's core schema for plain scalars; everything quoted is text.
fn scalar(text: &str, style: ScalarStyle) -> Value {
    if !matches!(style, ScalarStyle::Plain) {
        return json!(text);
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return json!(true),
        "false" | "False" | "FALSE" => return json!(false),
        _ => {}
    }
    if let Ok(number) = text.parse::<i64>() {
        // A number with leading zeros is an account id, not a number.
        let plain = number.to_string() == text;
        return if plain { json!(number) } else { json!(text) };
    }
    let looks_like_a_fraction = text.contains('.')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b".-+eE".contains(&byte));
    match text.parse::<f64>() {
        Ok(number) if looks_like_a_fraction => json!(number),
        _ => json!(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ids;

    impl PhysicalIds for Ids {
        fn reference(&self, logical_id: &str, _: &str) -> String {
            format!("stack-{logical_id}")
        }
        fn attribute(&self, logical_id: &str, _: &str, attribute: &str) -> String {
            format!("{logical_id}@{attribute}")
        }
        fn pseudo(&self, name: &str) -> Option<String> {
            (name == "Region").then(|| "us-east-1".to_owned())
        }
    }

    fn resolve(text: &str, parameters: &[(&str, &str)]) -> Result<Stack, TemplateError> {
        let parameters = parameters
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Template::parse(text)?.resolve(&parameters, &Ids)
    }

    const TEMPLATE: &str = r#"
Parameters:
  Days: { Type: Number, Default: 14, MinValue: 1, MaxValue: 14 }
  Kind: { Type: String, Default: topic, AllowedValues: [topic, queue, both] }
  Bucket: { Type: String }
Mappings:
  Retention: { "14": { Seconds: 1209600 }, "1": { Seconds: 86400 } }
Conditions:
  IsBoth: !Equals [!Ref Kind, both]
  HasQueue: !Or [!Equals [!Ref Kind, queue], !Condition IsBoth]
  HasNone: !Not [!Condition HasQueue]
Globals:
  Function: { Timeout: 3, Environment: { Variables: { A: global, B: global } } }
Resources:
  Queue:
    Type: AWS::SQS::Queue
    Properties:
      Retention: !FindInMap [Retention, !Ref Days, Seconds]
      Redrive: { target: !GetAtt Dead.Arn, count: 5 }
      Gone: !If [HasQueue, yes-please, !Ref AWS::NoValue]
      List: [a, !If [HasQueue, b, !Ref "AWS::NoValue"], c]
      Text: !Sub "${Queue.Arn}/${AWS::Region}/${Bucket}/${!literal}"
      Own: !Sub ["${One}-${Bucket}", { One: !Join ["+", [x, !Ref Days]] }]
      Account: 000000000000
      Quoted: "14"
  Dead: { Type: AWS::SQS::Queue, Condition: HasNone }
  Function:
    Type: AWS::Serverless::Function
    Properties: { Environment: { Variables: { B: own } } }
"#;

    #[test]
    fn functions_are_carried_out() {
        let stack = resolve(TEMPLATE, &[("Bucket", "photos")]).expect("resolved");
        let queue = &stack.resources["Queue"].properties;
        assert_eq!(queue["Retention"], json!(1_209_600));
        assert_eq!(queue["Redrive"], json!({"target": "Dead@Arn", "count": 5}));
        assert_eq!(queue.get("Gone"), None);
        assert_eq!(queue["List"], json!(["a", "c"]));
        assert_eq!(
            queue["Text"],
            json!("Queue@Arn/us-east-1/photos/${literal}")
        );
        assert_eq!(queue["Own"], json!("x+14-photos"));
        assert_eq!(queue["Account"], json!("000000000000"));
        assert_eq!(queue["Quoted"], json!("14"));
        assert!(stack.resources.contains_key("Dead"));
    }

    #[test]
    fn conditions_choose() {
        let stack = resolve(TEMPLATE, &[("Bucket", "photos"), ("Kind", "both")]).expect("resolved");
        assert_eq!(
            stack.resources["Queue"].properties["Gone"],
            json!("yes-please")
        );
        assert_eq!(
            stack.resources["Queue"].properties["List"],
            json!(["a", "b", "c"])
        );
        assert!(!stack.resources.contains_key("Dead"));
    }

    #[test]
    fn globals_lie_under_a_functions_own_properties() {
        let stack = resolve(TEMPLATE, &[("Bucket", "photos")]).expect("resolved");
        let function = &stack.resources["Function"].properties;
        assert_eq!(function["Timeout"], json!(3));
        assert_eq!(
            function["Environment"]["Variables"],
            json!({"A": "global", "B": "own"})
        );
    }

    #[test]
    fn parameters_are_checked() {
        assert_eq!(
            resolve(TEMPLATE, &[]).unwrap_err(),
            TemplateError::MissingParameter("Bucket".into())
        );
        let unknown = resolve(TEMPLATE, &[("Bucket", "b"), ("Other", "x")]).unwrap_err();
        assert_eq!(unknown, TemplateError::UnknownParameter("Other".into()));
        for (name, value, accepted) in [
            ("Kind", "none", "one of topic, queue, both is accepted"),
            ("Days", "15", "at most 14 is accepted"),
            ("Days", "0", "at least 1 is accepted"),
            ("Days", "soon", "a number is accepted"),
        ] {
            let error = resolve(TEMPLATE, &[("Bucket", "b"), (name, value)])
                .unwrap_err()
                .to_string();
            assert!(error.contains(accepted), "{error}");
        }
    }

    #[test]
    fn a_reference_to_nothing_says_where() {
        let text = "Resources: { Queue: { Type: T, Properties: { A: { B: !Ref Nothing } } } }";
        let error = resolve(text, &[]).unwrap_err().to_string();
        assert_eq!(
            error,
            "Queue.A.B: Nothing is neither a parameter nor a resource"
        );
        assert!(matches!(resolve("a: [", &[]), Err(TemplateError::Yaml(_))));
    }
}
