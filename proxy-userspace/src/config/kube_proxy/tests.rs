//! What becomes of a `KubeProxyConfiguration`.

use std::time::Duration;

use serde_json::Value;

use super::{File, KubeProxyConfiguration, ignored};
use crate::{
    algorithm::AlgorithmName,
    config::{DetectLocal, DetectLocalMode},
};

/// As kubeadm writes it into the ConfigMap `kube-proxy`.
const KUBEADM: &str = include_str!("kubeadm.yaml");

fn parse(fields: &str) -> KubeProxyConfiguration {
    KubeProxyConfiguration::parse(&document(fields)).unwrap()
}

fn error(fields: &str) -> String {
    KubeProxyConfiguration::parse(&document(fields)).unwrap_err().to_string()
}

fn document(fields: &str) -> String {
    format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}\n")
}

fn noted(configuration: &KubeProxyConfiguration) -> Vec<&str> {
    configuration.notes.iter().map(|note| note.field.as_str()).collect()
}

#[test]
fn what_kubeadm_writes_is_taken_without_a_word_but_on_node_ports() {
    let configuration = KubeProxyConfiguration::parse(KUBEADM).unwrap();
    assert_eq!(noted(&configuration), ["the lack of nodePortAddresses"]);
    let expected = KubeProxyConfiguration {
        kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
        detect_local: DetectLocal { cluster_cidr: Some("10.244.0.0/16".into()), ..DetectLocal::default() },
        notes: configuration.notes.clone(),
        ..KubeProxyConfiguration::default()
    };
    assert_eq!(configuration, expected);
}

#[test]
fn what_has_a_meaning_here_is_applied() {
    let configuration = parse(
        "hostnameOverride: node-7\nbindAddress: '::'\nhealthzBindAddress: '[::]:1'\nmetricsBindAddress: 127.0.0.1\n\
         mode: nftables\nnftables: {masqueradeAll: true, syncPeriod: 1m30s}\nnodePortAddresses: [primary, 192.0.2.0/24]\n\
         detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cbr0}\n\
         logging: {format: json, verbosity: 4}\n",
    );
    assert_eq!(noted(&configuration), ["mode"]);
    let detect_local =
        DetectLocal { mode: DetectLocalMode::BridgeInterface, bridge: Some("cbr0".into()), ..DetectLocal::default() };
    let expected = KubeProxyConfiguration {
        hostname_override: Some("node-7".into()),
        healthz_bind_address: Some("[::]:1".parse().unwrap()),
        metrics_bind_address: Some("127.0.0.1".parse().unwrap()),
        prefers_ipv6: true,
        node_port_addresses: Some("primary,192.0.2.0/24".parse().unwrap()),
        masquerade_all: true,
        detect_local,
        sync_period: Some(Duration::from_secs(90)),
        verbosity: 4,
        logs_json: true,
        notes: configuration.notes.clone(),
        ..KubeProxyConfiguration::default()
    };
    assert_eq!(configuration, expected);
}

#[test]
fn each_field_that_is_set_in_vain_is_named_once() {
    let cases = [
        ("nothing", "", ""),
        ("a gate", "featureGates: {NFTablesProxyMode: true}", "featureGates"),
        ("a gate that is closed", "featureGates: {NFTablesProxyMode: false}", ""),
        ("an address", "bindAddress: 192.0.2.7", "bindAddress"),
        ("no address", "bindAddress: '::'", ""),
        ("loopback NodePorts, usual", "iptables: {localhostNodePorts: true}", ""),
        ("loopback NodePorts, none", "iptables: {localhostNodePorts: false}", "iptables.localhostNodePorts"),
        ("several", "oomScoreAdj: -999\nconntrack: {maxPerCore: 32768, min: 0}", "conntrack.maxPerCore oomScoreAdj"),
        (
            "quantities",
            "logging: {flushFrequency: 5s, options: {json: {infoBufferSize: 1Mi}}}",
            "logging.flushFrequency logging.options.json.infoBufferSize",
        ),
        ("not Windows", "winkernel: {enableDSR: true, networkName: x}", "winkernel"),
        (
            "another mode's",
            "nftables: {masqueradeAll: true}\nipvs: {syncPeriod: 1s}",
            "ipvs.syncPeriod nftables.masqueradeAll",
        ),
        ("sections of nothing", "iptables:\nipvs: null\nconntrack: {}\nlogging: {vmodule: []}", ""),
    ];
    for (name, fields, expected) in cases {
        let configuration = parse(&format!("nodePortAddresses: [all]\n{fields}"));
        let mut found = noted(&configuration);
        found.sort_unstable();
        assert_eq!(found.join(" "), expected, "{name}");
    }
}

#[test]
fn masquerading_is_read_from_the_section_of_the_mode() {
    let sections = "iptables: {masqueradeAll: true}\nnftables: {masqueradeAll: false}";
    for (mode, expected) in [("''", true), ("iptables", true), ("ipvs", true), ("nftables", false)] {
        assert_eq!(parse(&format!("mode: {mode}\n{sections}")).masquerade_all, expected, "{mode}");
    }
}

#[test]
fn a_scheduler_of_ipvs_becomes_the_algorithm_most_like_it() {
    let cases = [
        ("mode: ipvs", Some(AlgorithmName::RoundRobin), "mode"),
        ("mode: ipvs\nipvs: {scheduler: wlc}", Some(AlgorithmName::LeastConnections), "mode"),
        ("mode: ipvs\nipvs: {scheduler: mh}", Some(AlgorithmName::Maglev), "mode"),
        ("mode: ipvs\nipvs: {scheduler: sh}", Some(AlgorithmName::SourceHash), "mode"),
        ("mode: ipvs\nipvs: {scheduler: dh}", None, "mode ipvs.scheduler"),
        ("ipvs: {scheduler: mh}", None, "ipvs.scheduler"),
    ];
    for (fields, expected, notes) in cases {
        let configuration = parse(&format!("nodePortAddresses: [all]\n{fields}"));
        assert_eq!((configuration.algorithm, noted(&configuration).join(" ").as_str()), (expected, notes), "{fields}");
    }
}

#[test]
fn what_is_not_known_or_means_nothing_is_refused_with_its_path() {
    let cases = [
        ("unknown", "clusterCidr: 10.0.0.0/8", "clusterCidr: unknown field"),
        ("unknown in a section", "ipvs: {schedular: rr}", "ipvs.schedular: unknown field"),
        ("unknown, deep", "logging: {options: {json: {flush: 1}}}", "logging.options.json.flush: unknown field"),
        ("of another shape", "iptables: {masqueradeAll: [1]}", "iptables.masqueradeAll: "),
        ("a mode of the past", "mode: userspace", "mode: unknown variant"),
        ("a mode of nobody", "detectLocalMode: ByName", "detectLocalMode: unknown variant"),
        ("no address", "healthzBindAddress: localhost:10256", "healthzBindAddress: \"localhost:10256\""),
        ("no network", "nodePortAddresses: [primary, public]", "nodePortAddresses: \"public\""),
        ("no duration", "iptables: {syncPeriod: soon}", "iptables.syncPeriod: "),
        ("a negative duration", "iptables: {syncPeriod: -1s}", "iptables.syncPeriod: "),
        ("no form", "logging: {format: xml}", "logging.format: \"xml\""),
        ("twice", "mode: ''\nmode: ipvs", "mode"),
        ("no YAML", "'mode: ipvs", "not YAML"),
    ];
    for (name, fields, expected) in cases {
        let error = error(fields);
        assert!(error.contains(expected), "{name}: {error}");
    }
    for other in ["", "kind: Service", "apiVersion: kubeproxy.config.k8s.io/v1beta1\nkind: KubeProxyConfiguration"] {
        let error = KubeProxyConfiguration::parse(other).unwrap_err().to_string();
        assert!(error.contains("not KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1"), "{other:?}: {error}");
    }
}

#[test]
fn every_field_is_applied_or_has_a_word_on_why_not() {
    const APPLIED: [&str; 15] = [
        "apiVersion",
        "kind",
        "clientConnection.kubeconfig",
        "logging.format",
        "logging.verbosity",
        "hostnameOverride",
        "healthzBindAddress",
        "metricsBindAddress",
        "detectLocalMode",
        "detectLocal.bridgeInterface",
        "detectLocal.interfaceNamePrefix",
        "clusterCIDR",
        "nodePortAddresses",
        "mode",
        "bindAddress",
    ];
    let known: Vec<&str> = APPLIED.into_iter().chain(ignored::fields()).collect();
    let is_known = |field: &str| known.iter().any(|known| field == *known || field.starts_with(&format!("{known}.")));
    let mut fields = Vec::new();
    leaves("", &serde_json::to_value(File::default()).unwrap(), &mut fields);
    assert!(fields.len() > 50, "{fields:?}");
    let unknown: Vec<&String> = fields.iter().filter(|field| !is_known(field)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    // And the table speaks of nothing else.
    for known in known {
        let is_field = |field: &String| field == known || field.starts_with(&format!("{known}."));
        assert!(fields.iter().any(is_field), "{known}");
    }
}

fn leaves(path: &str, value: &Value, fields: &mut Vec<String>) {
    match value {
        Value::Object(inner) => {
            for (name, value) in inner {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                leaves(&path, value, fields);
            }
        }
        _ => fields.push(path.to_owned()),
    }
}
