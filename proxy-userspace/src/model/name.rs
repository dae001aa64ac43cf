//! How objects and their parts are named.

use std::{fmt, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::{
    addr::Protocol,
    names::{ServiceName, Text},
};

/// Namespace and name of an object. Cheap to clone: it stands in many places.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Empty for a Node.
    pub namespace: Arc<str>,
    /// Unique in its namespace, per kind.
    pub name: Arc<str>,
}

impl ObjectName {
    /// The name in an object's metadata.
    pub fn of(metadata: &ObjectMeta) -> Self {
        let text = |text: &Option<String>| Arc::from(text.as_deref().unwrap_or_default());
        Self { namespace: text(&metadata.namespace), name: text(&metadata.name) }
    }
}

impl ObjectName {
    /// The Service that leads to the API server itself.
    pub fn of_api_server() -> Self {
        Self { namespace: "default".into(), name: "kubernetes".into() }
    }

    /// Whether it is that Service's.
    pub fn is_api_server(&self) -> bool {
        &*self.namespace == "default" && &*self.name == "kubernetes"
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Escaped: a name that no API server would accept must not reach a terminal as it is.
        if self.namespace.is_empty() {
            return write!(f, "{}", self.name.escape_debug());
        }
        write!(f, "{}/{}", self.namespace.escape_debug(), self.name.escape_debug())
    }
}

/// Which port of which Service. A Service may have one name with several protocols.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    /// The Service.
    pub service: ObjectName,
    /// Empty for the only port of a Service.
    pub port: String,
    /// Its protocol.
    pub protocol: Protocol,
}

impl From<&ServicePortName> for ServiceName {
    fn from(port: &ServicePortName) -> Self {
        Self {
            namespace: Text::new(&port.service.namespace),
            name: Text::new(&port.service.name),
            port: Text::new(&port.port),
        }
    }
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port.escape_debug())?;
        }
        write!(f, "/{}", self.protocol)
    }
}
