//! Label and field selectors, as far as a proxy uses them.

use anyhow::{Result, bail};
use serde_json::Value;

/// Requirements that an object must meet, all of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug)]
enum Requirement {
    HasLabel(String),
    HasNoLabel(String),
    /// JSON pointer, value, whether it must be equal.
    Value(String, String, bool),
}

impl Selector {
    pub(super) fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    pub(super) fn add_labels(&mut self, text: &str) {
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let pointer = |key: &str| format!("/metadata/labels/{}", key.replace('~', "~0").replace('/', "~1"));
            self.requirements.push(match (comparison(part), part.strip_prefix('!')) {
                (Some((key, value, is_equal)), _) => Requirement::Value(pointer(key), value.into(), is_equal),
                (None, Some(key)) => Requirement::HasNoLabel(pointer(key)),
                (None, None) => Requirement::HasLabel(pointer(part)),
            });
        }
    }

    pub(super) fn add_fields(&mut self, text: &str) -> Result<()> {
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let Some((field, value, is_equal)) = comparison(part) else { bail!("invalid selector: '{part}'") };
            if !["metadata.name", "metadata.namespace", "spec.clusterIP", "spec.type"].contains(&field) {
                bail!("field label not supported: {field}");
            }
            let pointer = format!("/{}", field.replace('.', "/"));
            self.requirements.push(Requirement::Value(pointer, value.into(), is_equal));
        }
        Ok(())
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::HasLabel(pointer) => object.pointer(pointer).is_some(),
            Requirement::HasNoLabel(pointer) => object.pointer(pointer).is_none(),
            Requirement::Value(pointer, value, is_equal) => {
                let found = object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
                (found == value) == *is_equal
            }
        })
    }
}

fn comparison(part: &str) -> Option<(&str, &str, bool)> {
    if let Some((key, value)) = part.split_once("!=") {
        return Some((key, value, false));
    }
    let (key, value) = part.split_once('=')?;
    Some((key, value.strip_prefix('=').unwrap_or(value), true))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Selector;

    #[test]
    fn objects_are_told_apart_as_a_proxy_asks() {
        let mut selector = Selector::default();
        selector.add_labels("!service.kubernetes.io/service-proxy-name,app=web");
        selector.add_fields("spec.clusterIP!=None").unwrap();
        let labels = |labels| json!({"metadata": {"labels": labels}, "spec": {"clusterIP": "10.0.0.1"}});
        assert!(selector.matches(&labels(json!({"app": "web"}))));
        assert!(!selector.matches(&labels(json!({"app": "other"}))));
        assert!(!selector.matches(&labels(json!({"app": "web", "service.kubernetes.io/service-proxy-name": ""}))));
        assert!(!selector.matches(&json!({"metadata": {"labels": {"app": "web"}}, "spec": {"clusterIP": "None"}})));
    }

    #[test]
    fn a_field_that_has_no_index_is_refused() {
        assert!(Selector::default().add_fields("spec.ports=80").is_err());
    }
}
