//! What is set in a `KubeProxyConfiguration` and has no meaning here: a table of fields with what happens instead.

use serde_json::Value;

use super::{
    Note,
    file::{File, Mode},
};

const OWN_FLOWS: &str = "connections are tracked in a flow table of Sluice's own, with fixed lifetimes";
const AT_ONCE: &str = "a change is written at once";
const WINDOWS: &str = "this is not Windows";
const UNMARKED: &str = "packets are not marked";
const FORM: &str = "every line of the log goes to standard error at once";
const PROTOCOL: &str = "the API server is spoken to in JSON";
const PACE: &str = "a few watches are all that is asked of the API server";

/// Fields that never mean anything here.
const IGNORED: [(&str, &str); 40] = [
    ("featureGates", "nothing here is behind a feature gate"),
    ("clientConnection.acceptContentTypes", PROTOCOL),
    ("clientConnection.contentType", PROTOCOL),
    ("clientConnection.qps", PACE),
    ("clientConnection.burst", PACE),
    ("logging.flushFrequency", FORM),
    ("logging.vmodule", "the environment variable RUST_LOG sets levels by module"),
    ("logging.options.text.splitStream", FORM),
    ("logging.options.text.infoBufferSize", FORM),
    ("logging.options.json.splitStream", FORM),
    ("logging.options.json.infoBufferSize", FORM),
    ("bindAddress", "the node's primary addresses are those of its Node object, else of its uplinks"),
    ("bindAddressHardFail", "an address that cannot be bound is tried again"),
    ("enableProfiling", "there is no profiling over HTTP"),
    ("showHiddenMetricsForVersion", "no metric is hidden"),
    ("mode", "there is one way here, and it is none of kube-proxy's modes"),
    ("iptables.masqueradeBit", UNMARKED),
    ("iptables.localhostNodePorts", "nodePortAddresses decides alone"),
    ("iptables.snatNodeInternalIP", "masqueraded packets always bear the node's primary address"),
    ("iptables.minSyncPeriod", AT_ONCE),
    ("ipvs.minSyncPeriod", AT_ONCE),
    ("ipvs.excludeCIDRs", "IPVS is not touched"),
    ("ipvs.strictARP", "no device gets the address of a Service, so there is none to answer for"),
    ("ipvs.tcpTimeout", OWN_FLOWS),
    ("ipvs.tcpFinTimeout", OWN_FLOWS),
    ("ipvs.udpTimeout", OWN_FLOWS),
    ("nftables.masqueradeBit", UNMARKED),
    ("nftables.minSyncPeriod", AT_ONCE),
    ("winkernel", WINDOWS),
    ("oomScoreAdj", "the priority class of the agent's pod decides"),
    ("conntrack.maxPerCore", OWN_FLOWS),
    ("conntrack.min", OWN_FLOWS),
    ("conntrack.tcpEstablishedTimeout", OWN_FLOWS),
    ("conntrack.tcpCloseWaitTimeout", OWN_FLOWS),
    ("conntrack.tcpBeLiberal", "no packet is refused for its sequence number"),
    ("conntrack.udpTimeout", OWN_FLOWS),
    ("conntrack.udpStreamTimeout", OWN_FLOWS),
    ("configSyncPeriod", "the API server is watched, nothing is asked for again and again"),
    ("portRange", "kube-proxy does not use it either"),
    ("windowsRunAsService", WINDOWS),
];

/// Fields that mean something in one of the modes only.
const BY_MODE: [(&str, &[Mode]); 6] = [
    ("iptables.masqueradeAll", &[Mode::Unset, Mode::IpTables, Mode::Ipvs]),
    ("iptables.syncPeriod", &[Mode::Unset, Mode::IpTables]),
    ("ipvs.scheduler", &[Mode::Ipvs]),
    ("ipvs.syncPeriod", &[Mode::Ipvs]),
    ("nftables.masqueradeAll", &[Mode::NfTables]),
    ("nftables.syncPeriod", &[Mode::NfTables]),
];

/// A note on each field that is set in vain.
pub(super) fn notes(file: &File) -> Vec<Note> {
    // A structure of options, numbers and text always becomes JSON.
    let value = serde_json::to_value(file).unwrap_or_default();
    let ignored = IGNORED.iter().filter(|(field, _)| is_set(field, at(&value, field)));
    let by_mode =
        BY_MODE.iter().filter(|(field, modes)| !modes.contains(&file.mode) && is_set(field, at(&value, field)));
    let ignored = ignored.map(|(field, instead)| (*field, *instead));
    let by_mode = by_mode.map(|(field, _)| (*field, "it belongs to another mode than the one that is set"));
    ignored.chain(by_mode).map(|(field, instead)| Note { field: field.into(), instead: instead.into() }).collect()
}

fn at<'a>(value: &'a Value, field: &str) -> &'a Value {
    field.split('.').fold(value, |value, name| &value[name])
}

/// Whether a field asks for something. Zero is what Go's types are without anything being said.
fn is_set(field: &str, value: &Value) -> bool {
    match (field, value) {
        // These have a default that is not zero.
        ("iptables.localhostNodePorts", Value::Bool(is_on)) => !is_on,
        ("bindAddress", Value::String(address)) => !["", "0.0.0.0", "::"].contains(&address.as_str()),
        (_, Value::Null) => false,
        (_, Value::Bool(is_on)) => *is_on,
        (_, Value::Number(number)) => number.as_f64() != Some(0.0),
        (_, Value::String(text)) => !["", "0", "0s"].contains(&text.as_str()),
        (_, Value::Array(items)) => !items.is_empty(),
        (_, Value::Object(fields)) => fields.iter().any(|(name, value)| is_set(name, value)),
    }
}

/// Every field of the tables.
#[cfg(test)]
pub(super) fn fields() -> impl Iterator<Item = &'static str> {
    IGNORED.iter().map(|(field, _)| *field).chain(BY_MODE.iter().map(|(field, _)| *field))
}
