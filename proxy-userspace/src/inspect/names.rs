//! What Service ports are called.

use std::{collections::HashMap, fmt};

use proxy_common::names::ServiceName;
use serde::Serialize;

use crate::dataplane::{self, FamilyReader};

/// A Service port, by name. One that the maps have no name for is called by its index.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PortName {
    /// Of the Service.
    pub namespace: String,
    /// Of the Service.
    pub name: String,
    /// Empty for the only port of a Service.
    pub port: String,
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)?;
        if self.port.is_empty() { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

impl From<&ServiceName> for PortName {
    fn from(name: &ServiceName) -> Self {
        // Escaped: a name that no API server would accept must not reach a terminal as it is.
        let text = |text: &str| text.escape_debug().to_string();
        Self {
            namespace: text(name.namespace.as_str()),
            name: text(name.name.as_str()),
            port: text(name.port.as_str()),
        }
    }
}

impl PortName {
    /// What an index is called that has this name, or none.
    pub(crate) fn of_index(index: u32, name: Option<&ServiceName>) -> Self {
        let unnamed = || Self { namespace: String::new(), name: format!("#{index}"), port: String::new() };
        name.map_or_else(unnamed, Self::from)
    }
}

/// The names of one family's Service ports, by index.
#[derive(Debug)]
pub struct Names(HashMap<u32, ServiceName>);

impl Names {
    /// Reads them.
    pub fn read(maps: &impl FamilyReader) -> Result<Self, dataplane::Error> {
        Ok(Self(maps.names()?))
    }

    /// What an index is called.
    pub fn of(&self, index: u32) -> PortName {
        PortName::of_index(index, self.0.get(&index))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proxy_common::names::{ServiceName, Text};

    use super::Names;

    #[test]
    fn a_port_is_called_as_its_service_or_by_its_index() {
        let called =
            |name, port| ServiceName { namespace: Text::new("default"), name: Text::new(name), port: Text::new(port) };
        let names = Names(HashMap::from([(1, called("web", "http")), (2, called("w\x1b[1m", ""))]));
        assert_eq!(names.of(1).to_string(), "default/web:http");
        assert_eq!(names.of(2).to_string(), "default/w\\u{1b}[1m");
        assert_eq!(names.of(3).to_string(), "#3");
    }
}
