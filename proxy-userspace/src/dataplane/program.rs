//! The programs of the BPF object that are attached somewhere, by name.

use std::fmt;

use serde::Serialize;

/// A program, named as in the BPF object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgramName {
    /// TC ingress of a pod's device.
    PodIn,
    /// TC egress of a pod's device.
    PodOut,
    /// XDP of an uplink.
    UplinkXdp,
    /// TC ingress of an uplink without XDP.
    UplinkIn,
    /// TC egress of an uplink.
    UplinkOut,
    /// TC ingress of an uplink whose packets begin with their IP header.
    UplinkInL3,
    /// TC egress of such an uplink.
    UplinkOutL3,
    /// Between the families: TC ingress of an uplink, behind all else.
    CrossUplinkIn,
    /// The same of a pod's device.
    CrossPodIn,
    /// connect(2), IPv4.
    Connect4,
    /// connect(2), IPv6.
    Connect6,
    /// sendmsg(2) of UDP, IPv4.
    Sendmsg4,
    /// sendmsg(2) of UDP, IPv6.
    Sendmsg6,
    /// recvmsg(2) of UDP, IPv4.
    Recvmsg4,
    /// recvmsg(2) of UDP, IPv6.
    Recvmsg6,
    /// getpeername(2), IPv4.
    Getpeername4,
    /// getpeername(2), IPv6.
    Getpeername6,
    /// bind(2) has taken a port, IPv4.
    PostBind4,
    /// bind(2) has taken a port, IPv6.
    PostBind6,
    /// The last descriptor of a socket is closed.
    SockRelease,
}

/// Where in the kernel a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// XDP of a device.
    Xdp,
    /// TC ingress of a device.
    Ingress,
    /// TC egress of a device.
    Egress,
    /// A socket operation of a cgroup, by `enum bpf_attach_type`.
    Socket(u32),
}

impl Hook {
    /// `enum bpf_attach_type` of a link at this hook.
    pub(super) fn attach_type(self) -> u32 {
        match self {
            Self::Xdp => 37,
            Self::Ingress => 46,
            Self::Egress => 47,
            Self::Socket(attach_type) => attach_type,
        }
    }
}

impl ProgramName {
    /// Every program. Those that the kernel verifies for longest come first.
    pub const ALL: [Self; 20] = [
        Self::UplinkXdp,
        Self::UplinkIn,
        Self::PodIn,
        Self::UplinkInL3,
        Self::PodOut,
        Self::UplinkOut,
        Self::UplinkOutL3,
        Self::CrossUplinkIn,
        Self::CrossPodIn,
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Getpeername4,
        Self::Getpeername6,
        Self::PostBind4,
        Self::PostBind6,
        Self::SockRelease,
    ];

    /// The name in the BPF object.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PodIn => "pod_in",
            Self::PodOut => "pod_out",
            Self::UplinkXdp => "uplink_xdp",
            Self::UplinkIn => "uplink_in",
            Self::UplinkOut => "uplink_out",
            Self::UplinkInL3 => "uplink_in_l3",
            Self::UplinkOutL3 => "uplink_out_l3",
            Self::CrossUplinkIn => "cross_uplink_in",
            Self::CrossPodIn => "cross_pod_in",
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
            Self::Sendmsg4 => "sendmsg4",
            Self::Sendmsg6 => "sendmsg6",
            Self::Recvmsg4 => "recvmsg4",
            Self::Recvmsg6 => "recvmsg6",
            Self::Getpeername4 => "getpeername4",
            Self::Getpeername6 => "getpeername6",
            Self::PostBind4 => "post_bind4",
            Self::PostBind6 => "post_bind6",
            Self::SockRelease => "sock_release",
        }
    }

    /// The program of a name.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|program| program.as_str() == name)
    }

    pub(super) fn hook(self) -> Hook {
        match self {
            Self::UplinkXdp => Hook::Xdp,
            Self::PodIn | Self::UplinkIn | Self::UplinkInL3 | Self::CrossUplinkIn | Self::CrossPodIn => Hook::Ingress,
            Self::PodOut | Self::UplinkOut | Self::UplinkOutL3 => Hook::Egress,
            Self::Connect4 => Hook::Socket(10),
            Self::Connect6 => Hook::Socket(11),
            Self::Sendmsg4 => Hook::Socket(14),
            Self::Sendmsg6 => Hook::Socket(15),
            Self::Recvmsg4 => Hook::Socket(19),
            Self::Recvmsg6 => Hook::Socket(20),
            Self::PostBind4 => Hook::Socket(12),
            Self::PostBind6 => Hook::Socket(13),
            Self::Getpeername4 => Hook::Socket(29),
            Self::Getpeername6 => Hook::Socket(30),
            Self::SockRelease => Hook::Socket(34),
        }
    }

    /// Whether it translates between the families: then it stands behind the others.
    pub(super) fn crosses(self) -> bool {
        matches!(self, Self::CrossUplinkIn | Self::CrossPodIn)
    }

    /// Whether clients outside are lost without it.
    pub(super) fn is_of_uplinks(self) -> bool {
        use ProgramName::{CrossUplinkIn, UplinkIn, UplinkInL3, UplinkOut, UplinkOutL3};
        matches!(self, UplinkIn | UplinkOut | UplinkInL3 | UplinkOutL3 | CrossUplinkIn)
    }

    /// Whether it is attached to the cgroup.
    pub(super) fn is_socket(self) -> bool {
        matches!(self.hook(), Hook::Socket(_))
    }
}

impl fmt::Display for ProgramName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
