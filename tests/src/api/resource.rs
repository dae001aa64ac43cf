//! What can be asked for, and how.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::selector::Selector;

/// A kind of object, by its plural.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// Services.
    Services,
    /// EndpointSlices.
    EndpointSlices,
    /// Nodes.
    Nodes,
    /// `ServiceCIDRs`.
    ServiceCidrs,
    /// Events, which can only be written.
    Events,
}

/// How objects are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// A list, or a page of one.
    List,
    /// A watch.
    Watch,
    /// A new object.
    Create,
    /// A part of an object.
    Patch,
}

impl Resource {
    /// What is served under a path.
    pub(super) fn at(path: &str) -> Option<Self> {
        match path {
            "/api/v1/services" => Some(Self::Services),
            "/apis/discovery.k8s.io/v1/endpointslices" => Some(Self::EndpointSlices),
            "/api/v1/nodes" => Some(Self::Nodes),
            "/apis/networking.k8s.io/v1/servicecidrs" => Some(Self::ServiceCidrs),
            _ => None,
        }
    }

    pub(super) fn of_kind(kind: &str) -> Option<Self> {
        [Self::Services, Self::EndpointSlices, Self::Nodes, Self::ServiceCidrs]
            .into_iter()
            .find(|resource| resource.kind() == kind)
    }

    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
            Self::ServiceCidrs => "ServiceCIDR",
            Self::Events => "Event",
        }
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
            Self::ServiceCidrs => "networking.k8s.io/v1",
            Self::Events => "events.k8s.io/v1",
        }
    }

    /// An object of the kind that is all defaults, which is what a bookmark carries.
    pub(super) fn hollow(self) -> Value {
        match self {
            Self::Services => json!({"spec": {}, "status": {"loadBalancer": {}}}),
            Self::EndpointSlices => json!({"addressType": "", "endpoints": null, "ports": null}),
            Self::ServiceCidrs => json!({"spec": {"cidrs": null}, "status": {}}),
            Self::Events => json!({}),
            Self::Nodes => json!({"spec": {}, "status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}}}),
        }
    }
}

/// The parameters of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Query {
    /// What is written instead of asked for.
    pub(super) writes: Option<Verb>,
    pub(super) is_watch: bool,
    pub(super) limit: Option<usize>,
    pub(super) continue_token: Option<String>,
    pub(super) resource_version: String,
    pub(super) version_match: Option<String>,
    pub(super) wants_bookmarks: bool,
    pub(super) wants_initial_events: bool,
    pub(super) timeout_seconds: Option<u64>,
    pub(super) selector: Selector,
}

impl Query {
    pub(super) fn verb(&self) -> Verb {
        let reads = if self.is_watch { Verb::Watch } else { Verb::List };
        self.writes.unwrap_or(reads)
    }

    pub(super) fn parse(raw: &str) -> Result<Self> {
        let mut query = Self::default();
        for (name, value) in form_urlencoded::parse(raw.as_bytes()) {
            query.set(&name, &value).with_context(|| format!("parameter {name}={value}"))?;
        }
        Ok(query)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let is_true = matches!(value, "true" | "1");
        match name {
            "watch" => self.is_watch = is_true,
            "limit" => self.limit = Some(value.parse()?).filter(|limit| *limit > 0),
            "continue" => self.continue_token = Some(value.to_owned()).filter(|token| !token.is_empty()),
            "resourceVersion" => value.clone_into(&mut self.resource_version),
            "resourceVersionMatch" => self.version_match = Some(value.to_owned()),
            "allowWatchBookmarks" => self.wants_bookmarks = is_true,
            "sendInitialEvents" => self.wants_initial_events = is_true,
            "timeoutSeconds" => self.timeout_seconds = Some(value.parse()?),
            "labelSelector" => self.selector.add_labels(value),
            "fieldSelector" => self.selector.add_fields(value)?,
            // A real server ignores what it does not know, too.
            _ => {}
        }
        Ok(())
    }
}
