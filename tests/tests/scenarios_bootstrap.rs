//! Scenarios of a node on which nobody serves the ClusterIP of the API server: the agent, started by the manifest, finds another way
//! there, and serves it to the others as soon as it can. Needs root.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
};

use anyhow::Result;
use serde_json::json;
use tests::install::Node;

const CLUSTER_IP: &str = "10.96.0.1";
const API: &str = "10.96.0.1:443/TCP";
const WEB: &str = "10.96.0.2:80/TCP";
const SERVERS: [&str; 2] = ["192.0.2.10:6443", "192.0.2.11:6443"];
const STATE: &str = "kubernetes.json";
const SEEDED: &str = "served as it was remembered";

/// A node that is told of its API server by its ClusterIP, which nobody serves.
fn node() -> Result<Node> {
    let mut node = Node::with_server_at(SERVERS[0].parse()?)?;
    node.host.api.address = SocketAddr::new(CLUSTER_IP.parse::<Ipv4Addr>()?.into(), 443);
    node.server.apply(json!({
        "kind": "Service", "metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {
            "type": "ClusterIP", "clusterIP": CLUSTER_IP, "clusterIPs": [CLUSTER_IP],
            "ports": [{"name": "https", "port": 443, "targetPort": 6443, "protocol": "TCP"}],
        },
    }))?;
    apply_endpoints(&node, &["192.0.2.10", "192.0.2.11"])?;
    Ok(node)
}

fn apply_endpoints(node: &Node, addresses: &[&str]) -> Result<()> {
    let endpoints: Vec<_> =
        addresses.iter().map(|address| json!({"addresses": [address], "conditions": {"ready": true}})).collect();
    node.server.apply(json!({
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}],
    }))
}

/// What kubeadm leaves in the cluster.
fn leave_kube_proxys_config_map(node: &mut Node, kubeconfig: &str) {
    let files = [("config.conf", "kind: KubeProxyConfiguration"), ("kubeconfig.conf", kubeconfig)];
    let files = files.into_iter().map(|(name, text)| (name.to_owned(), text.to_owned()));
    node.host.config_maps = BTreeMap::from([("kube-proxy".to_owned(), files.collect())]);
}

fn kubeconfig() -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: default\n\
         clusters: [{{name: default, cluster: {{server: \"https://{}\", certificate-authority: /nowhere}}}}]\n\
         contexts: [{{name: default, context: {{cluster: default, namespace: default, user: default}}}}]\n\
         users: [{{name: default, user: {{tokenFile: /nowhere}}}}]\n",
        SERVERS[0]
    )
}

/// One whose agent was in sync before it was rebooted.
fn rebooted() -> Result<Node> {
    let mut node = node()?;
    leave_kube_proxys_config_map(&mut node, &kubeconfig());
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    drop(pod);
    node.reboot()?;
    Ok(node)
}

#[test]
fn scenario_09_a_bootstrap_file_alone_knows_where_the_server_is() -> Result<()> {
    let cluster_info = format!(
        "apiVersion: v1\nkind: Config\nclusters: [{{name: \"\", cluster: {{server: \"https://{}\"}}}}]\n\
         contexts: []\nusers: []\ncurrent-context: \"\"\n",
        SERVERS[0]
    );
    for (whose, text) in [("kube-proxy's", kubeconfig()), ("cluster-info's", cluster_info)] {
        let mut node = node()?;
        leave_kube_proxys_config_map(&mut node, &text);
        let pod = node.start(&[])?;
        pod.wait_until_in_sync()?;
        assert!(!pod.says(SEEDED), "{whose}: nothing was remembered:\n{}", pod.text());
        node.wait_for_endpoints(WEB, &["10.0.0.1:8080"])?;
        node.wait_for_endpoints(API, &SERVERS)?;
    }
    Ok(())
}

#[test]
fn scenario_09_a_bootstrap_file_that_is_none_is_told_and_the_others_are_asked() -> Result<()> {
    for broken in ["{", "kind: Config", "clusters: [{name: a, cluster: {server: \"http://192.0.2.10:6443\"}}]"] {
        let mut node = node()?;
        leave_kube_proxys_config_map(&mut node, broken);
        let pod = node.start(&["--master", &format!("https://{}", SERVERS[0])])?;
        pod.wait_for("it names no API server")?;
        pod.wait_until_in_sync()?;
    }
    Ok(())
}

#[test]
fn scenario_09_after_a_reboot_the_remembered_endpoints_are_asked() -> Result<()> {
    let mut node = rebooted()?;
    node.host.config_maps.clear();
    // The first of them is gone for good. The certificate of the other one names the ClusterIP, and not where it is.
    node.sandbox.namespace.ip("address add 192.0.2.11 dev lo")?;
    let address = SERVERS[1].parse()?;
    let second = node.sandbox.namespace.run(|| node.server.replica(address))??;
    node.server.stop();
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    node.wait_for_endpoints(WEB, &["10.0.0.1:8080"])?;
    drop((pod, second));
    Ok(())
}

#[test]
fn scenario_09_after_a_reboot_the_api_servers_own_service_is_served_before_all_others() -> Result<()> {
    let mut node = rebooted()?;
    node.server.stop();
    let pod = node.start(&[])?;
    node.wait_for_endpoints(API, &SERVERS)?;
    assert_eq!(node.picture()?.keys().collect::<Vec<_>>(), [API], "half a picture");
    assert!(!pod.says("in sync") && !pod.container.probes.is_ready());
    // It is asked by the remembered endpoints, and what was written is found as if an agent had left it.
    let server = &mut node.server;
    node.sandbox.namespace.run(|| server.resume())??;
    pod.wait_until_in_sync()?;
    node.wait_for_endpoints(WEB, &["10.0.0.1:8080"])?;
    node.wait_for_endpoints(API, &SERVERS)
}

#[test]
fn scenario_09_what_is_remembered_is_never_written_over_what_is_there() -> Result<()> {
    let mut node = node()?;
    leave_kube_proxys_config_map(&mut node, &kubeconfig());
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    drop(pod);
    node.server.stop();
    let state = node.state.path().join(STATE);
    let text = fs::read_to_string(&state)?;
    let changed = text.replace("192.0.2.11", "192.0.2.12");
    assert_ne!(changed, text, "{text}");
    fs::write(&state, changed)?;
    let pod = node.start(&[])?;
    pod.wait_for("watching Services")?;
    assert!(!pod.says(SEEDED), "{}", pod.text());
    node.wait_for_endpoints(API, &SERVERS)?;
    node.wait_for_endpoints(WEB, &["10.0.0.1:8080"])
}

#[test]
fn scenario_09_a_state_that_is_broken_is_told_and_written_anew() -> Result<()> {
    let mut node = node()?;
    leave_kube_proxys_config_map(&mut node, &kubeconfig());
    let state = node.state.path().join(STATE);
    fs::write(&state, "{\"items\": [{\"kind\": \"Serv")?;
    let pod = node.start(&[])?;
    pod.wait_for("the API server is looked for elsewhere")?;
    pod.wait_until_in_sync()?;
    node.wait_for_endpoints(API, &SERVERS)?;
    let kept: serde_json::Value = serde_json::from_str(&fs::read_to_string(&state)?)?;
    let kinds: Vec<_> = kept["items"].as_array().into_iter().flatten().map(|item| item["kind"].clone()).collect();
    assert_eq!(kinds, [json!("Service"), json!("EndpointSlice")]);
    Ok(())
}
