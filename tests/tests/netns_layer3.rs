//! An uplink without a link-layer header: a tunnel's packets begin with their IP headers.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use tests::{
    lab::{
        Lab, LabOptions, Node, UplinkMode,
        address::{Addresses, Family},
        agent::{AgentOptions, SocketLb},
        manifest::{Service, write_nodes},
        tunnel::Tunnel,
    },
    traffic::{Ask, Failure, Protocol},
};

/// The tunnel's ends: the node's, and the client's.
const ENDS: [Addresses; 2] = [
    Addresses { v4: Ipv4Addr::new(192, 168, 77, 1), v6: Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 1) },
    Addresses { v4: Ipv4Addr::new(192, 168, 77, 2), v6: Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 2) },
];

fn connect(lab: &Lab, node: &Node) -> Result<Tunnel> {
    let namespaces = [node.host.namespace(), lab.client.namespace()];
    let tunnel = Tunnel::between(namespaces[0], namespaces[1], "tunnel")?;
    for (namespace, end) in namespaces.iter().zip(ENDS) {
        namespace.ip(&format!("addr add {}/24 dev tunnel\naddr add {}/64 dev tunnel nodad", end.v4, end.v6))?;
    }
    Ok(tunnel)
}

/// A Service whose backend is on the node, one whose is not, and one that has none.
fn services() -> [Service; 3] {
    [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"]), Service::new("nobody", 33, &[])]
}

#[test]
fn a_client_behind_a_tunnel_reaches_node_ports_and_is_told_where_nobody_serves() -> Result<()> {
    for uplink in [UplinkMode::Xdp, UplinkMode::Tc] {
        let source = tempfile::tempdir()?;
        write_nodes(source.path())?;
        services().iter().try_for_each(|service| service.write(source.path()))?;
        let lab = Lab::new(LabOptions { uplinks: [uplink; 2], ..LabOptions::default() })?;
        let node = lab.node("node-a")?;
        let _tunnel = connect(&lab, node)?;
        let more = ["--uplinks", "tunnel", "--nodeport-addresses", "all"].map(str::to_owned).to_vec();
        lab.start_agents(source.path(), &AgentOptions { socket_lb: SocketLb::Host, more, ..AgentOptions::default() })?;
        let [here, elsewhere, nobody] = services();
        for (family, protocol) in
            Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)))
        {
            let client = ENDS[1].of(family);
            for (service, peer) in [(&here, client), (&elsewhere, node.addresses().of(family))] {
                let target = service.at_node(ENDS[0], family, protocol);
                for answer in lab.client.ask_times(Ask::new(target), 3)? {
                    let answer = answer.with_context(|| target.to_string())?;
                    assert_eq!(
                        (answer.pod.as_str(), answer.from, answer.peer.ip()),
                        (service.pods[0], target.address, peer)
                    );
                }
            }
            let target = nobody.at_node(ENDS[0], family, protocol);
            let answer = lab.client.ask_times(Ask::new(target), 1)?.remove(0);
            assert!(matches!(answer, Err(Failure::Refused)), "{target}: {answer:?}");
        }
        let target = elsewhere.at_node(ENDS[0], Family::V6, Protocol::Tcp);
        assert_eq!(lab.client.transfer(Ask::new(target), 1 << 20)?.bytes, 1 << 20);
    }
    Ok(())
}
