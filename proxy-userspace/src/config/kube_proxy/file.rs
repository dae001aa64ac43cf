//! A `KubeProxyConfiguration` as it is written (`staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go`). Every field is
//! known, so that one that is not is a mistake and is refused. As in Go, null is nothing and so is zero.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::config::DetectLocalMode;

/// The whole file.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct File {
    pub(super) api_version: Option<String>,
    pub(super) kind: Option<String>,
    feature_gates: Option<BTreeMap<String, bool>>,
    #[serde(deserialize_with = "nullable")]
    pub(super) client_connection: ClientConnection,
    #[serde(deserialize_with = "nullable")]
    pub(super) logging: Logging,
    pub(super) hostname_override: Option<String>,
    pub(super) bind_address: Option<String>,
    pub(super) healthz_bind_address: Option<String>,
    pub(super) metrics_bind_address: Option<String>,
    bind_address_hard_fail: Option<bool>,
    enable_profiling: Option<bool>,
    show_hidden_metrics_for_version: Option<String>,
    #[serde(deserialize_with = "nullable")]
    pub(super) mode: Mode,
    #[serde(rename = "iptables", deserialize_with = "nullable")]
    pub(super) iptables: IpTables,
    #[serde(deserialize_with = "nullable")]
    pub(super) ipvs: Ipvs,
    #[serde(rename = "nftables", deserialize_with = "nullable")]
    pub(super) nftables: NfTables,
    #[serde(deserialize_with = "nullable")]
    winkernel: Winkernel,
    #[serde(deserialize_with = "nullable")]
    pub(super) detect_local_mode: DetectLocalMode,
    #[serde(deserialize_with = "nullable")]
    pub(super) detect_local: DetectLocal,
    #[serde(rename = "clusterCIDR")]
    pub(super) cluster_cidr: Option<String>,
    pub(super) node_port_addresses: Option<Vec<String>>,
    oom_score_adj: Option<i32>,
    #[serde(deserialize_with = "nullable")]
    conntrack: Conntrack,
    config_sync_period: Option<String>,
    port_range: Option<String>,
    windows_run_as_service: Option<bool>,
}

/// Which of kube-proxy's modes the file was written for: its settings are in the section of that name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    #[default]
    #[serde(rename = "")]
    Unset,
    IpTables,
    Ipvs,
    NfTables,
    KernelSpace,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ClientConnection {
    pub(super) kubeconfig: Option<String>,
    accept_content_types: Option<String>,
    content_type: Option<String>,
    qps: Option<f64>,
    burst: Option<i32>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Logging {
    pub(super) format: Option<String>,
    /// A duration, or a number of nanoseconds.
    flush_frequency: Option<Value>,
    pub(super) verbosity: Option<u32>,
    vmodule: Option<Vec<VModule>>,
    #[serde(deserialize_with = "nullable")]
    options: LoggingOptions,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct VModule {
    file_pattern: Option<String>,
    verbosity: Option<u32>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct LoggingOptions {
    #[serde(deserialize_with = "nullable")]
    text: LoggingForm,
    #[serde(deserialize_with = "nullable")]
    json: LoggingForm,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct LoggingForm {
    split_stream: Option<bool>,
    /// A quantity, with or without a unit.
    info_buffer_size: Option<Value>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct IpTables {
    masquerade_bit: Option<i32>,
    pub(super) masquerade_all: Option<bool>,
    localhost_node_ports: Option<bool>,
    #[serde(rename = "snatNodeInternalIP")]
    snat_node_internal_ip: Option<bool>,
    pub(super) sync_period: Option<String>,
    min_sync_period: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Ipvs {
    pub(super) sync_period: Option<String>,
    min_sync_period: Option<String>,
    pub(super) scheduler: Option<String>,
    #[serde(rename = "excludeCIDRs")]
    exclude_cidrs: Option<Vec<String>>,
    #[serde(rename = "strictARP")]
    strict_arp: Option<bool>,
    tcp_timeout: Option<String>,
    tcp_fin_timeout: Option<String>,
    udp_timeout: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct NfTables {
    masquerade_bit: Option<i32>,
    pub(super) masquerade_all: Option<bool>,
    pub(super) sync_period: Option<String>,
    min_sync_period: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Winkernel {
    network_name: Option<String>,
    source_vip: Option<String>,
    #[serde(rename = "enableDSR")]
    enable_dsr: Option<bool>,
    root_hns_endpoint_name: Option<String>,
    forward_health_check_vip: Option<bool>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct DetectLocal {
    pub(super) bridge_interface: Option<String>,
    pub(super) interface_name_prefix: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Conntrack {
    max_per_core: Option<i32>,
    min: Option<i32>,
    tcp_established_timeout: Option<String>,
    tcp_close_wait_timeout: Option<String>,
    tcp_be_liberal: Option<bool>,
    udp_timeout: Option<String>,
    udp_stream_timeout: Option<String>,
}

fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
