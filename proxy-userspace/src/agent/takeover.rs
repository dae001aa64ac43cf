//! Another proxy beside us: kube-proxy, whose place we take or give back. In: how the agent was started, what the kernel holds, and
//! which connections others translate. Out: what becomes of packets that no flow knows.
//!
//! A connection stays with whom it began with. So nobody's is taken at first, and those that come by are noted; then those that
//! the kernel's own table has are added to them, and all others are ours from then on.

use std::{collections::BTreeSet, net::IpAddr};

use proxy_common::{
    addr::{Address as _, Ipv4, Ipv6, Port},
    node::newcomers::{LEAVE, LOOK, UNDECIDED},
    service::Frontend,
};
use tracing::info;

use crate::{
    dataplane::{self, Dataplane, Unfound, netlink::conntrack::TranslatedConnection},
    desired::Tables,
};

/// Those of them that are addressed to Services. What else is translated on a node, a pod's `hostPort` for one, is nobody's to take.
pub(super) fn to_services(found: BTreeSet<TranslatedConnection>, tables: &Tables) -> BTreeSet<TranslatedConnection> {
    let is_to_service = |connection: &TranslatedConnection| {
        let (port, protocol) = (Port::new(connection.frontend.port()), connection.protocol);
        match connection.frontend.ip() {
            IpAddr::V4(address) => [Ipv4::from(address), Ipv4::ANY]
                .into_iter()
                .any(|address| tables.v4.services.contains_key(&Frontend::new(address, port, protocol))),
            IpAddr::V6(address) => [Ipv6::from(address), Ipv6::ANY]
                .into_iter()
                .any(|address| tables.v6.services.contains_key(&Frontend::new(address, port, protocol))),
        }
    };
    found.into_iter().filter(is_to_service).collect()
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// There is nobody else.
    Alone,
    /// New connections are left to the other one, as the operator wants it.
    Handover,
    /// They are left to it until it is known which ones it has.
    Begun,
    /// Its connections are known, and go on; new ones are ours.
    Following,
}

/// The course of a takeover.
#[derive(Debug)]
pub(super) struct Takeover {
    stage: Stage,
    /// Connections of the other one, when they were last counted.
    foreign: usize,
    /// Some were spoken of.
    is_told: bool,
}

impl Takeover {
    /// By what the kernel holds, and by whether the operator wants new connections to be left to another proxy.
    pub(super) fn new(dataplane: &Dataplane, hands_over: bool) -> Result<Self, dataplane::Error> {
        let left = dataplane.newcomers();
        let stage = if hands_over {
            Stage::Handover
        } else if left & (LEAVE | UNDECIDED) != 0 {
            Stage::Begun
        } else if left & LOOK != 0 {
            Stage::Following
        } else {
            Stage::Alone
        };
        if stage == Stage::Handover {
            info!("handing over: new connections are left to the other proxy on this node, known ones go on");
        }
        // Those that an agent before this one has left there.
        let foreign = dataplane.count_foreign()?;
        Ok(Self { stage, foreign, is_told: foreign > 0 })
    }

    /// What becomes of packets that no flow knows.
    pub(super) fn newcomers(&self) -> u32 {
        match self.stage {
            Stage::Alone => 0,
            Stage::Handover => LEAVE,
            Stage::Begun => LEAVE | LOOK,
            Stage::Following => LOOK,
        }
    }

    /// Whether the kernel's table of connections is to be looked at, again and again.
    pub(super) fn follows(&self) -> bool {
        self.stage == Stage::Following
    }

    /// Whether it is to be looked at now, because the programs see every packet from now on.
    pub(super) fn is_begun(&self) -> bool {
        self.stage == Stage::Begun
    }

    /// Takes in what was found there. `own` are the node's addresses. Returns how many connections of the other one there are.
    pub(super) fn absorb(
        &mut self,
        dataplane: &mut Dataplane,
        found: &BTreeSet<TranslatedConnection>,
        own: &BTreeSet<IpAddr>,
    ) -> Result<usize, dataplane::Error> {
        match self.stage {
            Stage::Alone | Stage::Handover => return Ok(self.foreign),
            Stage::Begun => {
                dataplane.put_foreign(found, own, Unfound::Stay)?;
                self.stage = Stage::Following;
                dataplane.put_newcomers(self.newcomers())?;
                // And what was noted meanwhile.
                self.foreign = dataplane.count_foreign()?;
                if !found.is_empty() {
                    self.is_told = true;
                    let connections = self.foreign;
                    info!(connections, "connections of another proxy go on as they are; new ones are taken over");
                }
            }
            Stage::Following => self.foreign = dataplane.put_foreign(found, own, Unfound::Go)?,
        }
        if self.foreign == 0 {
            self.stage = Stage::Alone;
            if self.is_told {
                info!("the last connection of another proxy is over: `sluice cleanup --kube-proxy` removes its rules");
            }
        }
        dataplane.put_newcomers(self.newcomers())?;
        Ok(self.foreign)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use proxy_common::{
        addr::{Address as _, Ipv4, Port, Protocol},
        service::{Frontend, Pick, WhenEmpty},
    };

    use super::to_services;
    use crate::{
        dataplane::netlink::conntrack::TranslatedConnection,
        desired::{DesiredService, Tables},
        model::{ObjectName, ServicePortName},
    };

    fn service() -> Arc<DesiredService<Ipv4>> {
        let service = ObjectName { namespace: "default".into(), name: "web".into() };
        Arc::new(DesiredService {
            port: Arc::new(ServicePortName { service, port: String::new(), protocol: Protocol::Tcp }),
            pick: Pick::default(),
            flags: 0,
            affinity_seconds: 0,
            sources: Arc::default(),
            internal: Arc::default(),
            external: Arc::default(),
            local: Arc::default(),
            serving: Arc::default(),
            internal_empty: WhenEmpty::Reject,
            external_empty: WhenEmpty::Reject,
        })
    }

    fn connection(protocol: Protocol, frontend: &str) -> TranslatedConnection {
        TranslatedConnection {
            protocol,
            client: "198.51.100.7:40000".parse().unwrap(),
            frontend: frontend.parse().unwrap(),
            backend: "10.244.2.5:8080".parse().unwrap(),
            answered: "198.51.100.7:40000".parse().unwrap(),
        }
    }

    #[test]
    fn what_is_translated_for_nobodys_service_is_left_out() {
        let mut tables = Tables::default();
        let (cluster_ip, any) = (Ipv4 { octets: [10, 96, 0, 10] }, Ipv4::ANY);
        for (address, port) in [(cluster_ip, 80), (any, 30_080)] {
            tables.v4.services.insert(Frontend::new(address, Port::new(port), Protocol::Tcp), service());
        }
        let cases = [
            ("a ClusterIP", connection(Protocol::Tcp, "10.96.0.10:80"), true),
            ("a NodePort, at any address", connection(Protocol::Tcp, "192.0.2.1:30080"), true),
            ("another protocol", connection(Protocol::Udp, "10.96.0.10:80"), false),
            ("another port of the ClusterIP", connection(Protocol::Tcp, "10.96.0.10:81"), false),
            ("a pod's hostPort", connection(Protocol::Tcp, "192.0.2.1:18080"), false),
            ("the other family", connection(Protocol::Tcp, "[2001:db8::1]:80"), false),
        ];
        for (name, connection, is_taken) in cases {
            let taken = to_services(BTreeSet::from([connection]), &tables);
            assert_eq!(taken.contains(&connection), is_taken, "{name}");
        }
    }
}
