//! An object as the server sent it. One that does not have the shape of its kind must not cost the others their list or
//! their watch, so it is received all the same: by name, with what is wrong with it.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;

/// An object, or what could be read of it.
#[derive(Clone, Debug)]
pub(super) enum Received<K> {
    /// It has the shape of its kind.
    Whole(K),
    /// It does not.
    Broken {
        /// Namespace, name and resource version.
        metadata: Box<ObjectMeta>,
        /// What is wrong with it.
        reason: String,
    },
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Received<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let metadata = Box::new(identity(&value));
        Ok(match serde_json::from_value(value) {
            Ok(object) => Self::Whole(object),
            Err(error) => Self::Broken { metadata, reason: error.to_string() },
        })
    }
}

/// What names an object and lets a watch go on after it; the rest of its metadata may be what is broken.
fn identity(object: &Value) -> ObjectMeta {
    let text = |field: &str| object.get("metadata")?.get(field)?.as_str().map(str::to_owned);
    ObjectMeta {
        namespace: text("namespace"),
        name: text("name"),
        resource_version: text("resourceVersion"),
        ..ObjectMeta::default()
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Received<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(dynamic_type: &()) -> Cow<'_, str> {
        K::kind(dynamic_type)
    }

    fn group(dynamic_type: &()) -> Cow<'_, str> {
        K::group(dynamic_type)
    }

    fn version(dynamic_type: &()) -> Cow<'_, str> {
        K::version(dynamic_type)
    }

    fn plural(dynamic_type: &()) -> Cow<'_, str> {
        K::plural(dynamic_type)
    }

    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Whole(object) => object.meta(),
            Self::Broken { metadata, .. } => metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Whole(object) => object.meta_mut(),
            Self::Broken { metadata, .. } => metadata,
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use kube::core::ObjectList;
    use serde_json::json;

    use super::Received;

    #[test]
    fn an_object_without_the_shape_of_its_kind_is_named_and_the_others_of_the_list_are_whole() {
        let list = json!({"metadata": {}, "items": [
            {"metadata": {"name": "good"}, "spec": {"clusterIP": "10.96.0.1"}},
            {"metadata": {"namespace": "test", "name": "bad", "resourceVersion": "7"}, "spec": {"ports": 7}},
            {"metadata": {"name": "worse", "labels": []}},
        ]});
        let list: ObjectList<Received<Service>> = serde_json::from_value(list).unwrap();
        let [Received::Whole(good), Received::Broken { metadata, reason }, Received::Broken { metadata: worse, .. }] =
            &list.items[..]
        else {
            panic!("{list:?}");
        };
        assert_eq!(good.metadata.name.as_deref(), Some("good"));
        assert_eq!(metadata.namespace.as_deref(), Some("test"));
        assert_eq!(metadata.name.as_deref(), Some("bad"));
        assert_eq!(metadata.resource_version.as_deref(), Some("7"));
        assert!(!reason.is_empty());
        assert_eq!(worse.name.as_deref(), Some("worse"));
    }
}
