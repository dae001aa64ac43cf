//! What leaves a Service without its endpoints although each object is valid: names that do not meet. A cluster's controllers write slices
//! whose names do; in files nobody but their author sees to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use k8s_openapi::api::{
    core::v1::{Service, ServicePort},
    discovery::v1::{EndpointPort, EndpointSlice},
};

use super::documents::Objects;
use crate::model::{HEADLESS, ObjectName, SERVICE_NAME};

/// Names that do not meet, one per text.
pub(super) fn complaints(objects: &Objects) -> impl Iterator<Item = String> {
    let mut slices: BTreeMap<ObjectName, Vec<&EndpointSlice>> = BTreeMap::new();
    let mut stray = Vec::new();
    for (name, slice) in &objects.slices {
        match service_of(name, slice) {
            Some(service) => slices.entry(service).or_default().push(slice),
            None => stray.push(format!(
                "EndpointSlice {name}: the label {SERVICE_NAME} is missing: it belongs to no Service, and is not used"
            )),
        }
    }
    let unmet = objects.services.iter().flat_map(move |(name, service)| {
        let slices = slices.get(name).map(Vec::as_slice).unwrap_or_default();
        unmet(name, service, slices)
    });
    stray.into_iter().chain(unmet)
}

fn service_of(name: &ObjectName, slice: &EndpointSlice) -> Option<ObjectName> {
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    Some(ObjectName { namespace: name.namespace.clone(), name: service.as_str().into() })
}

/// The Service's ports that none of its slices has, if they have endpoints at all.
fn unmet(name: &ObjectName, service: &Service, slices: &[&EndpointSlice]) -> Vec<String> {
    let is_of_use = |slice: &&&EndpointSlice| {
        let is_headless = slice.metadata.labels.iter().flatten().any(|(label, _)| label == HEADLESS);
        !is_headless && slice.endpoints.iter().flatten().next().is_some()
    };
    let slices: Vec<_> = slices.iter().filter(is_of_use).collect();
    let offered: BTreeSet<_> = slices.iter().flat_map(|slice| slice.ports.iter().flatten()).map(PortName::of).collect();
    if slices.is_empty() || is_headless(service) {
        return Vec::new();
    }
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let unmet = ports.filter(|port| !offered.contains(&PortName::from(port)));
    unmet.map(|port| complaint(name, port, &offered)).collect()
}

fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()).is_none_or(|address| address == "None")
}

fn complaint(name: &ObjectName, port: &ServicePort, offered: &BTreeSet<PortName<'_>>) -> String {
    let offered: Vec<_> = offered.iter().map(ToString::to_string).collect();
    let offered = if offered.is_empty() { "none".to_owned() } else { offered.join(", ") };
    format!(
        "Service {name}: port {} has no endpoints: it is {}, and the ports of its EndpointSlices are {offered}; name and protocol must be equal",
        port.port,
        PortName::from(port)
    )
}

/// By what a Service's port finds that of a slice.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct PortName<'a> {
    /// Empty where there is none.
    name: &'a str,
    protocol: &'a str,
}

impl<'a> PortName<'a> {
    fn of(port: &'a EndpointPort) -> Self {
        Self::new(port.name.as_deref(), port.protocol.as_deref())
    }

    fn from(port: &'a ServicePort) -> Self {
        Self::new(port.name.as_deref(), port.protocol.as_deref())
    }

    fn new(name: Option<&'a str>, protocol: Option<&'a str>) -> Self {
        Self { name: name.unwrap_or_default(), protocol: protocol.unwrap_or("TCP") }
    }
}

impl fmt::Display for PortName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name {
            "" => write!(f, "{} without a name", self.protocol),
            name => write!(f, "{} named {name:?}", self.protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::documents::{Objects, read};
    use super::complaints;

    const SERVICE: &str = "
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
---
";

    /// What is said of a Service with a port `http`, and of a slice with such ports.
    fn said(service: &str, metadata: &str, ports: &str, endpoints: &str) -> Vec<String> {
        let slice = format!(
            "kind: EndpointSlice\nmetadata: {{name: web-1{metadata}}}\naddressType: IPv4\nendpoints: [{endpoints}]\n{ports}"
        );
        let mut objects = Objects::default();
        assert!(read(&format!("{service}{slice}"), &mut objects).is_empty());
        complaints(&objects).collect()
    }

    const OF_WEB: &str = ", labels: {kubernetes.io/service-name: web}";
    const ENDPOINT: &str = "{addresses: [10.0.0.1]}";

    #[test]
    fn names_that_meet_are_nothing_to_complain_of() {
        assert_eq!(said(SERVICE, OF_WEB, "ports: [{name: http, port: 8080}]", ENDPOINT), [""; 0]);
        let unnamed = "kind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n---\n";
        assert_eq!(said(unnamed, OF_WEB, "ports: [{port: 8080, name: ''}]", ENDPOINT), [""; 0]);
        assert_eq!(said(SERVICE, OF_WEB, "ports: [{port: 8080}]", ""), [""; 0], "nobody is there yet");
        assert_eq!(said("", OF_WEB, "ports: [{port: 8080}]", ENDPOINT), [""; 0], "the Service may come later");
        for address in ["", "clusterIP: None, "] {
            let headless =
                format!("kind: Service\nmetadata: {{name: web}}\nspec: {{{address}ports: [{{port: 80}}]}}\n---\n");
            assert_eq!(said(&headless, OF_WEB, "ports: [{port: 80, name: x}]", ENDPOINT), [""; 0]);
        }
    }

    #[test]
    fn a_port_that_its_slices_do_not_have_is_named_with_those_that_they_have() {
        let cases = [
            ("ports: [{port: 8080}]", "TCP without a name"),
            ("ports: [{name: http, port: 8080, protocol: UDP}]", "UDP named \"http\""),
            ("ports: [{name: web, port: 1}, {port: 2}]", "TCP without a name, TCP named \"web\""),
            ("ports: []", "none"),
            ("", "none"),
        ];
        for (ports, offered) in cases {
            let expected = format!(
                "Service default/web: port 80 has no endpoints: it is TCP named \"http\", \
                 and the ports of its EndpointSlices are {offered}; name and protocol must be equal"
            );
            assert_eq!(said(SERVICE, OF_WEB, ports, ENDPOINT), [expected]);
        }
    }

    #[test]
    fn a_slice_without_its_label_is_told() {
        let told = said(SERVICE, "", "ports: [{name: http, port: 80}]", ENDPOINT);
        assert_eq!(
            told,
            ["EndpointSlice default/web-1: the label kubernetes.io/service-name is missing: \
              it belongs to no Service, and is not used"]
        );
    }
}
