//! The agent as a cluster would start it: what kubelet and a container runtime make of `deploy/sluice.yaml`, made by this process.
//!
//! There is neither of them here. This stand-in takes the DaemonSet's pod and starts its container: mounts, user, capabilities,
//! seccomp, environment, service account and probes. What it has no idea of makes it fail, so that nothing of the manifest is
//! passed over in silence. It differs from a node in this:
//!
//! * The image's files are hard links: the agent's binary, and the libraries it needs if it is not static, which that of
//!   `cargo xtask image` is.
//! * The cgroup namespace is the node's, and no cgroup is mounted but the manifest's. Of `/dev` there is what programs open by
//!   name; there are no terminals and no message queues.
//! * `RuntimeDefault` is moby's list of system calls; `AppArmor` and `SELinux` are nobody's.
//! * Volumes of the node lead where a test says, so that each has a node of its own. Arguments stay as they are.

mod confinement;
mod container;
mod feed;
mod kubelet;
mod manifest;
mod mounts;
mod node;
mod probe;
mod root;
mod seccomp;

pub use self::{
    confinement::mask,
    container::Container,
    feed::Feed,
    kubelet::{ApiAccess, Host, TOKEN},
    manifest::{HttpProbe, Manifest, Mount, Propagation, Rule, VolumeSource},
    mounts::RUNTIME_MOUNTS,
    node::{Node, Pod},
    probe::Probes,
};
