//! Which programs are attached to which devices, as whoever looks at a node finds it without its agent. In: the pins, and the
//! node's devices. Out: programs with the names of devices.

use std::{os::fd::AsFd as _, path::Path};

use super::{
    error::Error,
    links::{links_directory, pins},
    netlink::NodeNetwork,
    options::Options,
    preflight,
    program::{Hook, ProgramName},
    select::select,
    syscall,
};

/// Programs and where they are attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Each with its device, or `cgroup`.
    pub programs: Vec<(ProgramName, String)>,
    /// Those of TC are a guess: as filters of a clsact qdisc they have no pins, and by default they would be there.
    pub is_guess: bool,
}

impl Attached {
    /// Whether a program is attached to a device.
    pub fn has(&self, program: ProgramName, device: &str) -> bool {
        self.programs.iter().any(|(other, target)| *other == program && target == device)
    }

    /// Whether sockets are balanced.
    pub fn has_sockets(&self) -> bool {
        self.programs.iter().any(|(program, _)| program.is_socket())
    }
}

/// What is attached, by the pins under a path.
pub fn attached(pin_path: &Path, network: &NodeNetwork) -> Result<Attached, Error> {
    let found = pins(&links_directory(pin_path))?.into_iter();
    let programs = found.filter_map(|(program, target, path)| Some((program, place(program, target, &path, network)?)));
    let programs = programs.collect();
    // Where TCX is, it is used.
    if preflight::kernel_is_at_least((6, 6)) {
        return Ok(Attached { programs, is_guess: false });
    }
    Ok(with_filters(programs, network))
}

/// What a link is attached to: a device by the name that it has now, which its pin may not have yet. Nothing, if that has gone.
fn place(program: ProgramName, pinned: String, path: &Path, network: &NodeNetwork) -> Option<String> {
    let link = syscall::object(path).ok()?;
    let target = syscall::link_info(link.as_fd()).ok()?.target();
    let device = network.links.iter().find(|link| !program.is_socket() && u64::from(link.ifindex) == target);
    (target != 0).then(|| device.map_or(pinned, |device| device.name.clone()))
}

/// Adds the filters of TC that the defaults ask for, where none of TC's programs has a pin.
fn with_filters(mut programs: Vec<(ProgramName, String)>, network: &NodeNetwork) -> Attached {
    if programs.iter().any(|(program, _)| matches!(program.hook(), Hook::Ingress | Hook::Egress)) {
        return Attached { programs, is_guess: false };
    }
    let options = Options::new("");
    let selection = select(&options, network);
    programs.extend(selection.pod_devices.iter().map(|link| (ProgramName::PodIn, link.name.clone())));
    for link in selection.uplinks {
        let program = if link.is_layer3 { ProgramName::UplinkInL3 } else { ProgramName::UplinkIn };
        if !programs.contains(&(ProgramName::UplinkXdp, link.name.clone())) {
            programs.push((program, link.name.clone()));
        }
    }
    Attached { programs, is_guess: true }
}

#[cfg(test)]
mod tests {
    use super::{NodeNetwork, ProgramName, with_filters};
    use crate::dataplane::netlink::Link;

    fn network() -> NodeNetwork {
        let link = |ifindex, name: &str| Link { ifindex, name: name.into(), has_ethernet: true, ..Link::default() };
        NodeNetwork {
            links: vec![
                Link { has_default_route: true, ..link(2, "eth0") },
                Link { has_default_route: true, ..link(3, "eth1") },
                Link { is_pod_veth: true, ..link(4, "vetha") },
            ],
            addresses: Vec::new(),
        }
    }

    #[test]
    fn pins_are_taken_as_they_are_if_tc_has_some() {
        let pinned = vec![(ProgramName::PodIn, "veth9".to_owned()), (ProgramName::UplinkXdp, "eth0".to_owned())];
        let attached = with_filters(pinned.clone(), &network());
        assert_eq!((attached.programs, attached.is_guess), (pinned, false));
    }

    #[test]
    fn filters_have_no_pins_and_are_supposed_where_the_defaults_put_them() {
        let attached = with_filters(vec![(ProgramName::UplinkXdp, "eth0".to_owned())], &network());
        assert!(attached.is_guess && attached.has(ProgramName::PodIn, "vetha"));
        assert!(attached.has(ProgramName::UplinkIn, "eth1"), "it has no XDP");
        assert!(!attached.has(ProgramName::UplinkIn, "eth0") && !attached.has_sockets());
    }
}
