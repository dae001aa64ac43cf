//! What flags and a file become together.

use clap::Parser;

use super::{Arguments, ConfigError};
use crate::{
    cli::logging::LogFormat,
    config::{Config, KubeProxyConfiguration, Source},
};

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn arguments(flags: &[&str]) -> Arguments {
    let words = ["run", "--hostname-override", "here"].iter().chain(flags);
    Command::try_parse_from(words).unwrap().arguments
}

fn file(fields: &str) -> KubeProxyConfiguration {
    let text = format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}\n");
    KubeProxyConfiguration::parse(&text).unwrap()
}

fn config(flags: &[&str], fields: &str) -> Config {
    arguments(flags).into_config(file(fields)).unwrap()
}

/// The settings that both flags and a file may have.
fn shown(config: &Config) -> String {
    let address = |socket: Option<std::net::SocketAddr>| socket.map_or("-".into(), |socket| socket.to_string());
    let devices: Vec<String> = config.dataplane.pod_devices.iter().map(ToString::to_string).collect();
    let kubeconfig = match &config.source {
        Source::Kubernetes(server) => server.kubeconfig.clone().unwrap_or_default(),
        Source::Files(directory) => directory.clone(),
    };
    format!(
        "healthz {} metrics {} nodeports {} masquerade {} every {:?} devices {} bridge {} kubeconfig {}",
        address(config.healthz),
        address(config.metrics),
        config.node.node_port_addresses,
        config.masquerade.all,
        config.sync_period,
        devices.join(","),
        config.dataplane.pod_bridge.as_deref().unwrap_or("-"),
        kubeconfig.display(),
    )
}

#[test]
fn a_flag_decides_before_the_file_and_the_file_before_the_default() {
    let everything = "healthzBindAddress: 0.0.0.0:1\nmetricsBindAddress: 0.0.0.0:2\nnodePortAddresses: [all]\n\
                      iptables: {masqueradeAll: true, syncPeriod: 1m}\ndetectLocalMode: BridgeInterface\n\
                      detectLocal: {bridgeInterface: cbr0}\nclientConnection: {kubeconfig: /file}";
    let cases: [(&str, &[&str], &str, &str); 6] = [
        (
            "nothing",
            &[],
            "",
            "healthz 0.0.0.0:10256 metrics 127.0.0.1:10249 nodeports primary masquerade false every 30s \
         devices  bridge - kubeconfig ",
        ),
        (
            "a file",
            &[],
            everything,
            "healthz 0.0.0.0:1 metrics 0.0.0.0:2 nodeports all masquerade true every 60s \
         devices  bridge cbr0 kubeconfig /file",
        ),
        (
            "flags",
            &[
                "--healthz-bind-address=127.0.0.1:3",
                "--metrics-bind-address=",
                "--nodeport-addresses=localhost",
                "--masquerade-all=false",
                "--pod-devices=veth*",
                "--kubeconfig=/flag",
            ],
            everything,
            "healthz 127.0.0.1:3 metrics - nodeports localhost masquerade false every 60s devices veth* bridge - kubeconfig \
          /flag",
        ),
        (
            "a mode by flag",
            &["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=cali"],
            everything,
            "healthz 0.0.0.0:1 metrics 0.0.0.0:2 nodeports all masquerade true every 60s devices cali* bridge - kubeconfig \
          /file",
        ),
        (
            "IPv6",
            &["--masquerade-all"],
            "bindAddress: '::'",
            "healthz [::]:10256 metrics [::1]:10249 nodeports primary \
         masquerade true every 30s devices  bridge - kubeconfig ",
        ),
        (
            "by address",
            &["--cluster-cidr=10.0.0.0/8", "--detect-local-mode=ClusterCIDR"],
            "",
            "healthz 0.0.0.0:10256 \
         metrics 127.0.0.1:10249 nodeports primary masquerade false every 30s devices  bridge - kubeconfig ",
        ),
    ];
    for (name, flags, fields, expected) in cases {
        assert_eq!(shown(&config(flags, fields)), expected, "{name}");
    }
}

#[test]
fn the_node_is_named_by_the_flag_then_by_the_file() {
    let named = |flags: &[&str], fields: &str| {
        let words = ["run"].iter().chain(flags);
        let arguments = Command::try_parse_from(words).unwrap().arguments;
        arguments.into_config(file(fields)).unwrap().node.name
    };
    assert_eq!(named(&["--hostname-override= Flag "], "hostnameOverride: file"), "flag");
    if std::env::var_os("NODE_NAME").is_none() {
        assert_eq!(named(&[], "hostnameOverride: File"), "file");
    }
}

#[test]
fn settings_that_contradict_each_other_are_refused_with_advice() {
    let cases: [(&[&str], &str); 4] = [
        (&["--source-port-range=10000-30000"], "--source-port-range"),
        (&["--node-port-range=20000-20001"], "--source-port-range"),
        (&["--detect-local-mode=BridgeInterface"], "--pod-bridge-interface"),
        (&["--detect-local-mode=InterfaceNamePrefix"], "--pod-interface-name-prefix"),
    ];
    for (flags, expected) in cases {
        let error: ConfigError = arguments(flags).into_config(file("")).unwrap_err();
        assert!(error.to_string().contains(expected), "{flags:?}: {error}");
    }
}

#[test]
fn the_log_is_as_loud_as_the_flags_say_or_else_the_file() {
    let cases: [(&[&str], &str, u8); 9] = [
        (&[], "", 0),
        (&["-v"], "", 1),
        (&["-vv"], "", 2),
        (&["-v", "-v", "-v"], "", 3),
        (&["-v=2"], "", 0),
        (&["--v=4"], "", 1),
        (&["--v=9"], "", 3),
        (&[], "logging: {verbosity: 6}", 2),
        (&["-v=0"], "logging: {verbosity: 6}", 0),
    ];
    for (flags, fields, expected) in cases {
        assert_eq!(arguments(flags).verbosity(&file(fields)), expected, "{flags:?} {fields}");
    }
    assert_eq!(arguments(&[]).log_format(&file("logging: {format: json}")), LogFormat::Json);
    assert_eq!(arguments(&["--log-format=text"]).log_format(&file("logging: {format: json}")), LogFormat::Text);
}
