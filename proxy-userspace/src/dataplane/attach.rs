//! Attaches programs to devices and to the cgroup. Level-triggered: each call makes what is attached equal to what the
//! options and the devices that exist ask for, whatever was there before.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    fs::File,
    io, mem,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use aya::Ebpf;

use super::{
    clsact,
    devices::device_name,
    error::{Error, OpenError},
    links::{Change, Held, Links, LoadedProgram, Target},
    load,
    netlink::{Link, NodeNetwork},
    options::{ClassifierMode, Options, UplinkMode},
    preflight,
    program::ProgramName,
    select::{select, takes_xdp},
};

const XDP_FLAGS_SKB_MODE: u32 = 2;
const XDP_FLAGS_DRV_MODE: u32 = 4;

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// In the device's driver.
    Xdp,
    /// After the kernel has made an skb.
    XdpGeneric,
    /// At the head of the device's TCX chain.
    Tcx,
    /// As a filter of the clsact qdisc.
    Clsact,
    /// To the cgroup.
    Cgroup,
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Xdp => "xdp",
            Self::XdpGeneric => "xdp-generic",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::Cgroup => "cgroup",
        })
    }
}

/// A program that is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Which.
    pub program: ProgramName,
    /// Name of the device, or path of the cgroup.
    pub target: String,
    /// Interface index of the device.
    pub ifindex: Option<u32>,
    /// How.
    pub mechanism: Mechanism,
}

/// Something that could not be attached as wanted. The rest is.
#[derive(Debug, thiserror::Error)]
pub enum AttachProblem {
    /// Another XDP program is there.
    #[error("device {device} already has an XDP program{}: it was left alone, and the device gets TC instead", id(*.program))]
    XdpOccupied {
        /// The device.
        device: String,
        /// Id of the program that is there, if netlink knew.
        program: Option<u32>,
    },
    /// The driver does not take it.
    #[error("device {device} takes no XDP program in this mode ({source}): it gets TC instead")]
    XdpUnsupported {
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A name that no device has.
    #[error("there is no device {device} yet: it is attached when it appears")]
    DeviceAbsent {
        /// As given.
        device: String,
    },
    /// Anything else.
    #[error("program {program} cannot be attached to {target}: {source}")]
    Failed {
        /// Which program.
        program: ProgramName,
        /// Name of the device, or path of the cgroup.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program that should no longer be there.
    #[error("link {pin} cannot be removed: {source}")]
    NotRemoved {
        /// Name of its pin.
        pin: String,
        /// Why not.
        source: io::Error,
    },
}

fn id(program: Option<u32>) -> String {
    program.map_or_else(String::new, |id| format!(" (id {id})"))
}

/// What is attached after a round, and what is not.
#[derive(Debug, Default)]
pub struct AttachReport {
    /// Everything that is attached.
    pub attachments: Vec<Attachment>,
    /// Everything that is not as wanted.
    pub problems: Vec<AttachProblem>,
}

impl AttachReport {
    /// How many programs could not be attached.
    pub fn failures(&self) -> usize {
        self.problems.iter().filter(|problem| matches!(problem, AttachProblem::Failed { .. })).count()
    }

    /// Whether the node's own processes, or all clients outside, would miss Services for want of a program. A device that has gone
    /// meanwhile needs none, and the devices of pods come and go.
    pub fn lacks_programs(&self) -> bool {
        self.problems.iter().any(|problem| match problem {
            AttachProblem::Failed { program, source, .. } => {
                let has_gone = source.raw_os_error() == Some(libc::ENODEV);
                !has_gone && (program.is_socket() || program.is_of_uplinks())
            }
            _ => false,
        })
    }
}

/// The cgroup whose sockets are balanced.
#[derive(Debug)]
struct Cgroup {
    path: PathBuf,
    directory: File,
    /// The kernel's id of a cgroup is its directory's inode number.
    id: u64,
}

/// What is needed to attach again and again.
#[derive(Debug)]
pub(super) struct Attacher {
    options: Options,
    cgroup: Option<Cgroup>,
    /// Those that were attached once.
    programs: BTreeMap<ProgramName, LoadedProgram>,
    uses_tcx: bool,
    /// What was attached by links in the last round: none is lost with its pin.
    held: Held,
    /// The clsact filters of ours that may exist; none before the first round.
    filters: Option<BTreeSet<(String, ProgramName)>>,
    /// Devices on which XDP is known to be in the wanted mode. What netlink said of the mode is older than our links.
    settled: BTreeSet<u32>,
    /// The problems of the last round: each is logged once, not at every event.
    known_problems: BTreeSet<String>,
}

impl Attacher {
    pub(super) fn new(options: &Options, cgroup: Option<&Path>) -> Result<Self, OpenError> {
        let cgroup = cgroup.map(open_cgroup).transpose()?;
        Ok(Self {
            options: options.clone(),
            cgroup,
            programs: BTreeMap::new(),
            uses_tcx: options.classifiers == ClassifierMode::Auto && preflight::kernel_is_at_least((6, 6)),
            held: Held::default(),
            filters: None,
            settled: BTreeSet::new(),
            known_problems: BTreeSet::new(),
        })
    }

    /// One round.
    pub(super) fn attach(&mut self, object: &mut Ebpf, network: &NodeNetwork) -> Result<AttachReport, Error> {
        let links = Links::read(&self.options.pin_path, &mut self.held)?;
        let selection = select(&self.options, network);
        let mut round = Round {
            programs: mem::take(&mut self.programs),
            attacher: self,
            object,
            links,
            report: AttachReport::default(),
            filters: BTreeSet::new(),
        };
        for device in selection.absent {
            round.report.problems.push(AttachProblem::DeviceAbsent { device });
        }
        for link in selection.pod_devices {
            round.classifier(ProgramName::PodIn, link);
            round.classifier(ProgramName::PodOut, link);
            round.crossing(ProgramName::CrossPodIn, link);
        }
        for link in selection.uplinks {
            round.uplink(link);
        }
        round.sockets();
        let (report, filters, held, programs) = round.finish(network);
        (self.held, self.programs) = (held, programs);
        let xdp = report.attachments.iter().filter(|attachment| attachment.program == ProgramName::UplinkXdp);
        self.settled = xdp.filter_map(|attachment| attachment.ifindex).collect();
        self.remove_filters(network, filters);
        self.log_problems(&report);
        Ok(report)
    }

    /// Removes our filters from where none of ours is wanted any more: each side of a device has one place for them,
    /// and a second one for what stands behind, whatever program it holds. In the first round nothing is known of a predecessor's, so every device is asked.
    fn remove_filters(&mut self, network: &NodeNetwork, wanted: BTreeSet<(String, ProgramName)>) {
        let is_wanted = |device: &str, program: ProgramName| {
            wanted.iter().any(|(other, wanted)| {
                other == device && wanted.hook() == program.hook() && wanted.crosses() == program.crosses()
            })
        };
        if let Some(filters) = &self.filters {
            for (device, program) in filters.iter().filter(|(device, program)| !is_wanted(device, *program)) {
                clsact::remove_program(device, *program);
            }
        } else {
            for link in &network.links {
                for program in [ProgramName::PodIn, ProgramName::PodOut, ProgramName::CrossPodIn] {
                    if !is_wanted(&link.name, program) && clsact::remove_program(&link.name, program) {
                        tracing::info!(device = link.name, "removed a filter that is not wanted any more");
                    }
                }
            }
        }
        self.filters = Some(wanted);
    }

    fn log_problems(&mut self, report: &AttachReport) {
        let problems: BTreeSet<String> = report.problems.iter().map(ToString::to_string).collect();
        for problem in problems.difference(&self.known_problems) {
            tracing::warn!("{problem}");
        }
        self.known_problems = problems;
    }
}

fn open_cgroup(path: &Path) -> Result<Cgroup, OpenError> {
    let error = |source: io::Error| OpenError::NotCgroup { path: path.into(), reason: source.to_string() };
    let directory = File::open(path).map_err(error)?;
    let id = directory.metadata().map_err(error)?.ino();
    Ok(Cgroup { path: path.into(), directory, id })
}

/// A target, for the report.
#[derive(Clone, Copy)]
struct Place<'a> {
    name: &'a str,
    ifindex: Option<u32>,
}

impl<'a> From<&'a Link> for Place<'a> {
    fn from(link: &'a Link) -> Self {
        Self { name: &link.name, ifindex: Some(link.ifindex) }
    }
}

/// What a round leaves: the report, the filters that are wanted, the links that are held, and the programs.
type Ended = (AttachReport, BTreeSet<(String, ProgramName)>, Held, BTreeMap<ProgramName, LoadedProgram>);

/// One round of attaching.
struct Round<'a> {
    attacher: &'a Attacher,
    object: &'a mut Ebpf,
    programs: BTreeMap<ProgramName, LoadedProgram>,
    links: Links,
    report: AttachReport,
    filters: BTreeSet<(String, ProgramName)>,
}

impl Round<'_> {
    fn uplink(&mut self, link: &Link) {
        if link.is_layer3 {
            self.classifier(ProgramName::UplinkInL3, link);
            self.classifier(ProgramName::UplinkOutL3, link);
            return;
        }
        if !self.xdp(link) {
            self.classifier(ProgramName::UplinkIn, link);
        }
        self.classifier(ProgramName::UplinkOut, link);
        self.crossing(ProgramName::CrossUplinkIn, link);
    }

    /// Translates between the families if that is wanted, where frames have the header that it takes.
    fn crossing(&mut self, program: ProgramName, link: &Link) {
        if self.attacher.options.crosses && !link.is_layer3 {
            self.classifier(program, link);
        }
    }

    /// Attaches XDP if it is wanted there, and says whether it is attached.
    fn xdp(&mut self, link: &Link) -> bool {
        if !takes_xdp(&self.attacher.options, link) {
            return false;
        }
        let (flags, mechanism) = match self.attacher.options.uplink_mode {
            UplinkMode::XdpGeneric => (XDP_FLAGS_SKB_MODE, Mechanism::XdpGeneric),
            UplinkMode::Xdp | UplinkMode::Tc => (XDP_FLAGS_DRV_MODE, Mechanism::Xdp),
        };
        let wants_generic = mechanism == Mechanism::XdpGeneric;
        // A link keeps the mode it was made with, perhaps by a predecessor with other options.
        let is_settled = self.attacher.settled.contains(&link.ifindex);
        if !is_settled && link.xdp_program.is_some() && link.has_generic_xdp != wants_generic {
            let removed = self.links.remove(ProgramName::UplinkXdp, Target::Device(&link.name, link.ifindex));
            self.note_removal(&link.name, removed);
        }
        match self.link(ProgramName::UplinkXdp, Target::Device(&link.name, link.ifindex), flags) {
            Ok(()) => {
                self.attached(ProgramName::UplinkXdp, link.into(), mechanism);
                true
            }
            Err(source) => {
                let device = link.name.clone();
                self.report.problems.push(match source.raw_os_error() {
                    Some(libc::EBUSY) => AttachProblem::XdpOccupied { device, program: link.xdp_program },
                    _ => AttachProblem::XdpUnsupported { device, source },
                });
                false
            }
        }
    }

    fn classifier(&mut self, program: ProgramName, link: &Link) {
        let (result, mechanism) = if self.attacher.uses_tcx {
            (self.link(program, Target::Device(&link.name, link.ifindex), 0), Mechanism::Tcx)
        } else {
            self.filters.insert((link.name.clone(), program));
            (self.filter(program, &link.name), Mechanism::Clsact)
        };
        self.outcome(program, link.into(), mechanism, result);
    }

    fn sockets(&mut self) {
        let Some(cgroup) = &self.attacher.cgroup else { return };
        let path = cgroup.path.display().to_string();
        for program in ProgramName::ALL.into_iter().filter(|program| program.is_socket()) {
            let result = self.link(program, Target::Cgroup(cgroup.directory.as_fd(), cgroup.id), 0);
            self.outcome(program, Place { name: &path, ifindex: None }, Mechanism::Cgroup, result);
        }
    }

    fn link(&mut self, program: ProgramName, target: Target<'_>, flags: u32) -> io::Result<()> {
        let loaded = loaded(&mut self.programs, self.object, program)?;
        let change = self.links.ensure(program, loaded, target, flags)?;
        if change != Change::None {
            tracing::debug!(%program, ?target, ?change, "attached");
        }
        Ok(())
    }

    fn filter(&mut self, program: ProgramName, device: &str) -> io::Result<()> {
        loaded(&mut self.programs, self.object, program)?;
        clsact::ensure(self.object, program, device).map_err(io::Error::other)
    }

    fn outcome(&mut self, program: ProgramName, place: Place<'_>, mechanism: Mechanism, result: io::Result<()>) {
        match result {
            Ok(()) => self.attached(program, place, mechanism),
            Err(source) => {
                self.report.problems.push(AttachProblem::Failed { program, target: place.name.into(), source });
            }
        }
    }

    fn attached(&mut self, program: ProgramName, place: Place<'_>, mechanism: Mechanism) {
        let Place { name, ifindex } = place;
        self.report.attachments.push(Attachment { program, target: name.into(), ifindex, mechanism });
    }

    fn note_removal(&mut self, pin: &str, result: io::Result<()>) {
        if let Err(source) = result {
            self.report.problems.push(AttachProblem::NotRemoved { pin: pin.into(), source });
        }
    }

    /// What is not wanted goes last, so that no device is without a program in between. A list of devices that one of them leaves while it is
    /// read may lack another (`NLM_F_DUMP_INTR`), which is no reason to leave that without its program.
    fn finish(mut self, network: &NodeNetwork) -> Ended {
        let is_missed = |target: u64| {
            let ifindex = u32::try_from(target).unwrap_or_default();
            network.links.iter().all(|link| link.ifindex != ifindex) && device_name(ifindex).is_some()
        };
        let (removed, held) = mem::replace(&mut self.links, Links::empty()).remove_others(is_missed);
        for (pin, result) in removed {
            tracing::debug!(pin, "removed a link that is not wanted any more");
            self.note_removal(&pin, result);
        }
        (self.report, self.filters, held, self.programs)
    }
}

/// A program that the kernel has been given, or is given now.
fn loaded<'a>(
    programs: &'a mut BTreeMap<ProgramName, LoadedProgram>,
    object: &mut Ebpf,
    program: ProgramName,
) -> io::Result<&'a LoadedProgram> {
    Ok(match programs.entry(program) {
        Entry::Occupied(loaded) => loaded.into_mut(),
        Entry::Vacant(place) => place.insert(load::loaded(object, program).map_err(io::Error::other)?),
    })
}
