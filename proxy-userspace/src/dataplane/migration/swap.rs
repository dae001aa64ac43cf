//! Giving everything that is attached the programs of this version, at once: what is attached stays as it is, so that nothing of it is
//! without a program in between. What the options ask for besides is attached, or not, in the agent's first round.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::Ebpf;
use tracing::warn;

use crate::dataplane::{
    clsact,
    error::{Error, OpenError},
    layout::Layout,
    links::{self, links_directory},
    load, netlink,
    options::{ClassifierMode, Options},
    preflight,
    program::ProgramName,
    select::select,
    syscall,
};

/// What is to be done, made ready.
pub(super) struct Swap {
    links: Vec<(PathBuf, OwnedFd, ProgramName)>,
    programs: BTreeMap<ProgramName, OwnedFd>,
    /// Links of programs that this version does not have.
    strangers: Vec<PathBuf>,
    /// Filters that there may be, by program and device.
    filters: Vec<(ProgramName, String)>,
}

impl Swap {
    /// Looks at what is attached, and loads what of it the options do not ask for any more: it goes on until the first round.
    pub(super) fn prepare(options: &Options, object: &mut Ebpf, theirs: &Layout) -> Result<Self, OpenError> {
        let directory = links_directory(&options.pin_path);
        let mut swap =
            Self { links: Vec::new(), programs: BTreeMap::new(), strangers: Vec::new(), filters: Vec::new() };
        for (program, _, path) in links::pins(&directory)? {
            let Some(link) = links::open(&path)? else { continue };
            swap.add_program(object, program)?;
            swap.links.push((path, link, program));
        }
        let error = |source| Error::Links { path: directory.clone(), source };
        for entry in fs::read_dir(&directory).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let program = name.split_once('-').map_or("", |(program, _)| program);
            if ProgramName::from_name(program).is_none() && theirs.programs.contains(program) {
                swap.strangers.push(entry.path());
            }
        }
        if options.classifiers == ClassifierMode::Clsact || !preflight::kernel_is_at_least((6, 6)) {
            swap.add_filters(options, object)?;
        }
        Ok(swap)
    }

    fn add_program(&mut self, object: &mut Ebpf, program: ProgramName) -> Result<(), OpenError> {
        if self.programs.contains_key(&program) {
            return Ok(());
        }
        self.programs.insert(program, load::loaded(object, program)?.fd);
        Ok(())
    }

    /// A filter does not say which program it has: it is the one that its device would be given.
    fn add_filters(&mut self, options: &Options, object: &mut Ebpf) -> Result<(), OpenError> {
        let network = netlink::snapshot_blocking().map_err(|source| Error::Kernel { what: "its devices", source })?;
        let selection = select(options, &network);
        for link in selection.pod_devices {
            for program in [ProgramName::PodIn, ProgramName::PodOut, ProgramName::CrossPodIn] {
                self.filters.push((program, link.name.clone()));
            }
        }
        for link in selection.uplinks {
            let programs: &[ProgramName] = if link.is_layer3 {
                &[ProgramName::UplinkInL3, ProgramName::UplinkOutL3]
            } else {
                &[ProgramName::UplinkIn, ProgramName::UplinkOut, ProgramName::CrossUplinkIn]
            };
            self.filters.extend(programs.iter().map(|program| (*program, link.name.clone())));
        }
        let programs: Vec<ProgramName> = self.filters.iter().map(|(program, _)| *program).collect();
        programs.into_iter().try_for_each(|program| self.add_program(object, program))
    }

    /// Does it; returns how many links and filters have got a program. What cannot be given one is detached: it would go on
    /// with flows that nobody else knows.
    pub(super) fn run(self, object: &mut Ebpf) -> usize {
        let mut swapped = 0;
        for (path, link, program) in &self.links {
            let Some(fd) = self.programs.get(program) else { continue };
            match syscall::update_link(link.as_fd(), fd.as_fd()) {
                Ok(()) => swapped += 1,
                // Its device is gone.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                Err(error) => detach(path, &error),
            }
        }
        for path in &self.strangers {
            detach(path, &io::Error::other("this version has no such program"));
        }
        // Where there is none, none is made.
        let filters = self.filters.iter();
        swapped + filters.filter(|(program, device)| clsact::replace_program(object, *program, device)).count()
    }
}

fn detach(path: &Path, reason: &io::Error) {
    warn!("{} is detached until it is attached anew: {reason}", path.display());
    if let Err(error) = links::detach(path) {
        warn!("{} cannot be removed: {error}", path.display());
    }
}
