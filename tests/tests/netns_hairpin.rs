//! A pod that picks itself.

use anyhow::Result;
use tests::{
    lab::{
        LabOptions,
        address::{self, Family},
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::Service,
    },
    traffic::{Ask, Protocol},
};

fn cluster(socket_lb: SocketLb) -> Result<(Cluster, [Service; 2])> {
    // A routed pod and a bridged one.
    let services = [Service::new("mirror-a", 20, &["a2"]), Service::new("mirror-b", 21, &["b2"])];
    let options = AgentOptions { socket_lb, ..AgentOptions::default() };
    Ok((Cluster::start(LabOptions::default(), options, &services)?, services))
}

#[test]
fn a_pod_reaches_itself_through_its_device() -> Result<()> {
    let (cluster, services) = cluster(SocketLb::Off)?;
    for service in services {
        let pod = service.pods[0];
        let (_, own) = address::pod(pod).unwrap();
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                let target = service.cluster(family, protocol);
                let answer = cluster.lab.place(pod)?.ask(Ask::new(target))?;
                assert_eq!((answer.pod.as_str(), answer.from), (pod, target.address));
                assert!(!own.has(answer.peer.ip()), "{pod} answers itself past the Service: {answer:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_by_its_sockets() -> Result<()> {
    let (cluster, services) = cluster(SocketLb::All)?;
    for service in services {
        let pod = service.pods[0];
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                let target = service.cluster(family, protocol);
                let answer = cluster.lab.place(pod)?.ask(Ask::new(target))?;
                assert_eq!((answer.pod.as_str(), answer.from), (pod, target.address));
            }
        }
    }
    Ok(())
}

#[test]
fn a_connection_to_itself_carries_large_transfers() -> Result<()> {
    let (cluster, services) = cluster(SocketLb::Off)?;
    for service in services {
        for family in Family::ALL {
            let ask = Ask::new(service.cluster(family, Protocol::Tcp));
            let report = cluster.lab.place(service.pods[0])?.transfer(ask, 1 << 20)?;
            assert_eq!(report.pod, service.pods[0]);
        }
    }
    Ok(())
}
