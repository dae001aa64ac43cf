//! From the text of a file to objects. A document that is broken is told by its number; the others count.

use std::{collections::BTreeMap, mem};

use k8s_openapi::{
    Metadata,
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::ObjectName;

/// Objects by kind and name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Objects {
    pub(super) services: BTreeMap<ObjectName, Service>,
    pub(super) slices: BTreeMap<ObjectName, EndpointSlice>,
    pub(super) nodes: BTreeMap<ObjectName, Node>,
    pub(super) service_cidrs: BTreeMap<ObjectName, ServiceCIDR>,
}

/// A document, or an item of a list in it, that is left out.
#[derive(Debug, thiserror::Error)]
#[error("document {number}: {problem}")]
pub(super) struct Broken {
    /// From 1, counting documents with content.
    number: usize,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("not YAML: {0}")]
    Yaml(String),
    #[error("it has no `kind`")]
    Kindless,
    #[error("{kind} of {api_version:?}, not of {expected:?}")]
    Version { kind: String, api_version: String, expected: &'static str },
    #[error("{kind} {name}: {reason}")]
    Shape { kind: &'static str, name: String, reason: serde_json::Error },
    #[error("{kind} has no metadata.name")]
    Nameless { kind: &'static str },
    #[error("{kind} {name} was there before; this one is used")]
    Again { kind: &'static str, name: ObjectName },
}

/// Adds the objects of a file. Kinds the agent has no use for are passed over.
pub(super) fn read(text: &str, objects: &mut Objects) -> Vec<Broken> {
    let mut broken = Vec::new();
    for (index, document) in split(text).iter().enumerate() {
        let mut note = |problem| broken.push(Broken { number: index + 1, problem });
        match parse(document) {
            Ok(value) => add(value, None, objects, &mut note),
            Err(problem) => note(problem),
        }
    }
    broken
}

/// What `kubectl get -o json` writes is YAML, too; read as what it is, it takes less time.
fn parse(document: &str) -> Result<Value, Problem> {
    let json = document.trim_start().starts_with('{').then(|| serde_json::from_str(document).ok()).flatten();
    json.map_or_else(
        || {
            let yaml = serde_saphyr::from_str_with_options(document, yaml_options());
            yaml.map_err(|error| Problem::Yaml(first_line(&error.to_string())))
        },
        Ok,
    )
}

/// As YAML 1.2 has it: `n`, `no` and `off` are words, which may be names. The operator's own files may be large.
fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! { strict_booleans: true, with_snippet: false, budget: None }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Documents with content. A line that begins with `---` always begins a document (YAML 1.2.2, section 9.1.2), so that
/// one that is broken does not hide where the next one begins.
fn split(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for line in text.lines() {
        let marker = ["---", "..."].iter().find_map(|marker| line.strip_prefix(marker));
        let rest = marker.filter(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if rest.is_some() {
            documents.push(String::new());
        }
        if let Some(document) = documents.last_mut() {
            document.push_str(rest.unwrap_or(line));
            document.push('\n');
        }
    }
    documents.retain(|document| document.lines().map(str::trim).any(|line| !line.is_empty() && !line.starts_with('#')));
    documents
}

/// Items of a typed list need not name their kind.
fn add(mut value: Value, item_kind: Option<&str>, objects: &mut Objects, note: &mut impl FnMut(Problem)) {
    let Some(kind) = value.get("kind").and_then(Value::as_str).or(item_kind).map(str::to_owned) else {
        return note(Problem::Kindless);
    };
    if let (Some(item_kind), Some(Value::Array(items))) = (kind.strip_suffix("List"), value.get_mut("items")) {
        let item_kind = Some(item_kind).filter(|kind| !kind.is_empty());
        for item in mem::take(items) {
            add(item, item_kind, objects, &mut *note);
        }
        return;
    }
    let added = match kind.as_str() {
        "Service" => add_object(value, "Service", "v1", "default", &mut objects.services),
        "EndpointSlice" => add_object(value, "EndpointSlice", "discovery.k8s.io/v1", "default", &mut objects.slices),
        "Node" => add_object(value, "Node", "v1", "", &mut objects.nodes),
        "ServiceCIDR" => add_object(value, "ServiceCIDR", "networking.k8s.io/v1", "", &mut objects.service_cidrs),
        _ => Ok(()),
    };
    added.unwrap_or_else(note);
}

fn add_object<T: DeserializeOwned + Metadata<Ty = ObjectMeta>>(
    value: Value,
    kind: &'static str,
    expected: &'static str,
    namespace: &str,
    objects: &mut BTreeMap<ObjectName, T>,
) -> Result<(), Problem> {
    if let Some(api_version) = value.get("apiVersion").and_then(Value::as_str).filter(|version| *version != expected) {
        return Err(Problem::Version { kind: kind.into(), api_version: api_version.into(), expected });
    }
    let written_name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut object: T =
        serde_json::from_value(value).map_err(|reason| Problem::Shape { kind, name: written_name, reason })?;
    if !namespace.is_empty() {
        object.metadata_mut().namespace.get_or_insert_with(|| namespace.into());
    }
    let name = ObjectName::of(object.metadata());
    if name.name.is_empty() {
        return Err(Problem::Nameless { kind });
    }
    match objects.insert(name.clone(), object) {
        Some(_) => Err(Problem::Again { kind, name }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Objects, read};

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1}\n";

    fn names(text: &str) -> (Vec<String>, Vec<String>) {
        let mut objects = Objects::default();
        let broken = read(text, &mut objects).iter().map(ToString::to_string).collect();
        let services = objects.services.keys();
        let names = services.chain(objects.slices.keys()).chain(objects.nodes.keys());
        let names = names.chain(objects.service_cidrs.keys());
        (names.map(ToString::to_string).collect(), broken)
    }

    #[test]
    fn a_broken_document_is_named_and_the_others_count() {
        let slice =
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1}\naddressType: IPv4\n";
        let text = format!("# a comment\n---\n{SERVICE}---\nkind: [unclosed\n  - x: {{\n---\n{slice}");
        let (names, broken) = names(&text);
        assert_eq!(names, ["default/web", "default/web-1"]);
        assert_eq!(broken.len(), 1);
        assert!(broken[0].starts_with("document 2: not YAML"), "{broken:?}");
    }

    #[test]
    fn what_does_not_have_the_shape_of_its_kind_is_named() {
        let cases = [
            ("kind: Service\nmetadata: {name: x}\nspec: {ports: 7}\n", "document 1: Service x: "),
            ("kind: Service\nspec: {}\n", "document 1: Service has no metadata.name"),
            ("metadata: {name: x}\n", "document 1: it has no `kind`"),
            ("just words\n", "document 1: it has no `kind`"),
            (
                "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: x}\naddressType: IPv4\n",
                "document 1: EndpointSlice of \"discovery.k8s.io/v1beta1\"",
            ),
        ];
        for (text, expected) in cases {
            let (names, broken) = names(text);
            assert!(names.is_empty() && broken.len() == 1, "{text}: {names:?} {broken:?}");
            assert!(broken[0].starts_with(expected), "{broken:?}");
        }
    }

    #[test]
    fn lists_are_their_items() {
        let item = "{kind: Service, metadata: {name: a, namespace: n}, spec: {}}";
        let list = format!("apiVersion: v1\nkind: List\nitems: [{item}, {{kind: Service, spec: {{}}}}]\n");
        let (found, broken) = names(&list);
        assert_eq!((found, broken.len()), (vec!["n/a".to_owned()], 1));
        let cidr =
            "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: c}\nspec: {cidrs: [10.96.0.0/16]}\n";
        assert_eq!(names(cidr), (vec!["c".to_owned()], vec![]));
        let typed = "kind: NodeList\nitems: [{metadata: {name: node-a}}]\n";
        assert_eq!(names(typed).0, ["node-a"]);
    }

    #[test]
    fn json_is_read_as_the_same_in_yaml() {
        let yaml = "kind: List\nitems:\n- {kind: Service, metadata: {name: a, namespace: 'n'}, spec: {}}\n- {kind: Node, metadata: {name: b}}\n";
        let json = r#"
            {"kind": "List", "items": [
                {"kind": "Service", "metadata": {"name": "a", "namespace": "n"}, "spec": {}},
                {"kind": "Node", "metadata": {"name": "b"}}
            ]}"#;
        assert_eq!(names(json), names(yaml));
        // Flow style, which only looks like it.
        assert_eq!(names("{kind: Node, metadata: {name: b}}").0, ["b"]);
        let (found, broken) = names(r#"{"kind": "Node", "metadata": "#);
        assert!(found.is_empty() && broken[0].starts_with("document 1: not YAML"), "{broken:?}");
    }

    #[test]
    fn other_kinds_and_empty_documents_are_passed_over() {
        let (names, broken) = names("---\n---\n# nothing\n---\nkind: Deployment\nmetadata: {name: x}\n...\n");
        assert!(names.is_empty() && broken.is_empty(), "{names:?} {broken:?}");
    }

    #[test]
    fn an_object_that_is_there_twice_counts_as_it_is_there_last() {
        let mut objects = Objects::default();
        let broken = read(&format!("{SERVICE}---\n{}", SERVICE.replace("96.0.1", "96.0.2")), &mut objects);
        assert_eq!(broken.len(), 1);
        let service = objects.services.values().next().unwrap();
        assert_eq!(service.spec.as_ref().unwrap().cluster_ip.as_deref(), Some("10.96.0.2"));
    }
}
