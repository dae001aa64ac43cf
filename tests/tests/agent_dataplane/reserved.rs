//! Source ports of masqueraded flows are kept from the node's own sockets, and what others keep is left alone.

use std::{fs, path::Path};

use anyhow::Result;
use proxy_userspace::dataplane::{Dataplane, Removed, cleanup};

use crate::fixture::Node;

const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";

/// In the calling thread's namespace.
fn reserved() -> Result<String> {
    Ok(fs::read_to_string(Path::new("/proc/sys").join(RESERVED))?.trim().to_owned())
}

#[test]
fn source_ports_are_reserved_beside_those_of_others_and_given_back_by_cleanup_alone() -> Result<()> {
    let node = Node::new()?;
    node.namespace.sysctl(RESERVED, "8080,15000-15010")?;
    node.run(|| {
        let mut dataplane = Dataplane::open(&node.options)?;
        dataplane.reserve_ports(&(10_000..=29_999));
        assert_eq!(reserved()?, "8080,10000-29999");
        drop(dataplane);
        assert_eq!(reserved()?, "8080,10000-29999", "what is in the kernel stays");

        // Another agent adopts them; others go on using the list meanwhile.
        fs::write(Path::new("/proc/sys").join(RESERVED), "8080,10000-29999,40000")?;
        let mut dataplane = Dataplane::open(&node.options)?;
        dataplane.reserve_ports(&(9_000..=19_999));
        assert_eq!(reserved()?, "8080,9000-19999,40000");
        fs::write(Path::new("/proc/sys").join(RESERVED), "8080,40000")?;
        dataplane.reserve_ports(&(9_000..=19_999));
        assert_eq!(reserved()?, "8080,9000-19999,40000", "taken out by others, and back");
        drop(dataplane);

        let removed = cleanup(&node.options.pin_path)?.removed;
        assert!(removed.iter().any(|one| matches!(one, Removed::ReservedPorts { .. })), "{removed:?}");
        assert_eq!(reserved()?, "8080,40000");
        assert!(!node.options.pin_path.exists());
        Ok(())
    })
}

#[test]
fn what_was_reserved_by_others_is_not_given_back() -> Result<()> {
    let node = Node::new()?;
    node.namespace.sysctl(RESERVED, "15000-15010")?;
    node.run(|| {
        Dataplane::open(&node.options)?.reserve_ports(&(10_000..=29_999));
        assert_eq!(reserved()?, "10000-29999");
        cleanup(&node.options.pin_path)?;
        assert_eq!(reserved()?, "15000-15010");
        Ok(())
    })
}

/// Else nobody on the node could connect any more.
#[test]
fn ports_that_the_nodes_own_sockets_live_of_are_not_taken_from_them() -> Result<()> {
    let node = Node::new()?;
    node.namespace.sysctl("net/ipv4/ip_local_port_range", "10000 29999")?;
    node.run(|| {
        Dataplane::open(&node.options)?.reserve_ports(&(10_000..=29_999));
        assert_eq!(reserved()?, "");
        cleanup(&node.options.pin_path).map(drop)?;
        Ok(())
    })
}
