//! `sluice run`: from arguments and a file to a configuration, and then the agent.

mod arguments;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{EX_CONFIG, Failure, cleanup, logging};
use crate::{agent, config::KubeProxyConfiguration, confine, dataplane};

pub(super) use self::arguments::Arguments;

pub(super) fn execute(arguments: Arguments) -> Result<(), Failure> {
    if arguments.cleanup == Some(true) {
        return cleanup::at(&arguments.pin_path, arguments.state_dir.as_deref());
    }
    let mut file = match &arguments.config {
        Some(path) => KubeProxyConfiguration::read(path).map_err(|error| Failure::new(error, EX_CONFIG))?,
        None => KubeProxyConfiguration::default(),
    };
    logging::start(arguments.log_format(&file), arguments.verbosity(&file));
    for note in file.notes.drain(..) {
        tracing::warn!("{note}");
    }
    raise_descriptor_limit();
    let (confines, state) = (arguments.confines(), arguments.state_dir.clone());
    let mut config = arguments.into_config(file).map_err(|error| Failure::new(error, EX_CONFIG))?;
    if confines {
        // What only has to be done once, before.
        if let Some(state) = state.as_deref()
            && let Err(error) = std::fs::create_dir_all(state)
        {
            tracing::warn!("{}: {error}; correct --state-dir", state.display());
        }
        dataplane::mount_bpf_file_system(&config.dataplane.pin_path);
        config.confined = confine::confine(&config.dataplane.pin_path, state.as_deref());
    }
    dataplane::keep_little_free_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, 1))?;
    let ended = runtime.block_on(agent::run(config));
    // A source that waits for its API server is not waited for.
    runtime.shutdown_background();
    ended.map_err(|error| {
        let code = error.exit_code();
        Failure::new(error, code)
    })
}

/// Each pod's device takes some descriptors, and a service manager's usual limit is of a thousand.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the limit of file descriptors stays as it is: {error}");
    }
}

/// What comes of the flags and the file they name.
pub(super) fn configuration(arguments: Arguments) -> anyhow::Result<crate::config::Config> {
    let file = arguments.config.as_deref().map(KubeProxyConfiguration::read).transpose()?;
    Ok(arguments.into_config(file.unwrap_or_default())?)
}
