//! What a Service of one family contributes for clients of the other one: frontends by which it can be reached from outside,
//! with its own backends behind them. All of it stands in the tables of IPv6, where an IPv4 address is a mapped one.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use proxy_common::{
    addr::{Port, Protocol},
    service::{Frontend, flag},
};

use super::{
    DesiredService, Family,
    contribution::{World, permitted, port_services, restrict, whole},
    sources,
};
use crate::model::{self, Problem, ServicePort, SourceScope};

/// Frontends of the family that the Service has no ClusterIP of. SCTP does not cross, because its checksum covers all of a packet.
pub(super) fn frontends<A: Family>(
    service: &model::Service,
    world: &World<'_>,
    refused: &mut Vec<Problem>,
) -> BTreeMap<Frontend<A>, Arc<DesiredService<A>>> {
    let mut frontends = BTreeMap::new();
    let Some(home) = service.cluster_ips.first().filter(|_| service.crosses) else { return frontends };
    if !A::HAS_BOTH {
        return frontends;
    }
    if !world.crosses {
        refused.push(Problem::NotCrossed);
        return frontends;
    }
    let meant = |address: IpAddr| A::mixed(address).filter(|_| address.is_ipv4() != home.is_ipv4());
    let any = if home.is_ipv4() { Some(A::ANY) } else { A::mixed(Ipv4Addr::UNSPECIFIED.into()) };
    let sources = sources::sources(service, world.place, !home.is_ipv4());
    for port in service.ports.iter().filter(|port| port.name.protocol != Protocol::Sctp) {
        let outside = crossed(service, port, world);
        let restricted = restrict(&outside, sources.as_ref());
        let mut add = |address: A, service: &Arc<DesiredService<A>>| {
            let frontend = Frontend::new(address, Port::new(port.port.get()), port.name.protocol);
            frontends.entry(frontend).or_insert_with(|| Arc::clone(service));
            let whole = || Arc::new(whole(&port.name, flag::EXTERNAL | flag::CROSS));
            frontends.entry(Frontend::whole(address)).or_insert_with(whole);
        };
        let check = |address| world.rules.check(address, port);
        for address in permitted(&service.balancer_ips, meant, check, refused) {
            add(address, &restricted);
        }
        let outside = if service.source_ranges.scope == SourceScope::All { restricted } else { outside };
        let check = |address| world.rules.check_external_ip(address, port);
        for address in permitted(&service.external_ips, meant, check, refused) {
            add(address, &outside);
        }
        if let (Some(any), Some(number)) = (any, port.node_port) {
            let frontend = Frontend::new(any, Port::new(number.get()), port.name.protocol);
            frontends.entry(frontend).or_insert(outside);
        }
    }
    frontends
}

/// What external addresses of the other family lead to. Nothing is dispatched: only this node can translate the replies.
fn crossed<A: Family>(service: &model::Service, port: &ServicePort, world: &World<'_>) -> Arc<DesiredService<A>> {
    let [_, outside] = port_services(service, port, world);
    let flags = outside.flags & !flag::DISPATCHED | flag::CROSS;
    Arc::new(DesiredService { flags, local: Arc::default(), ..outside })
}
