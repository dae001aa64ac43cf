//! The lab with agents in it and Services to reach.

use std::path::Path;

use anyhow::Result;
use tempfile::TempDir;

use super::{
    Lab, LabOptions,
    agent::AgentOptions,
    manifest::{Service, write_nodes},
};

/// A lab whose agents watch a directory of objects.
#[derive(Debug)]
pub struct Cluster {
    /// The lab, with an agent on each node.
    pub lab: Lab,
    /// What the agents were started with.
    pub options: AgentOptions,
    source: TempDir,
}

impl Cluster {
    /// Builds the lab and starts the agents, which know the Services once this returns.
    pub fn start(lab: LabOptions, options: AgentOptions, services: &[Service]) -> Result<Self> {
        Self::start_with(lab, options, |source| services.iter().try_for_each(|service| service.write(source)))
    }

    /// The same with whatever is written into the directory first.
    pub fn start_with(lab: LabOptions, options: AgentOptions, write: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let source = tempfile::tempdir()?;
        write_nodes(source.path())?;
        write(source.path())?;
        let lab = Lab::new(lab)?;
        lab.start_agents(source.path(), &options)?;
        Ok(Self { lab, options, source })
    }

    /// The directory that the agents watch.
    pub fn source(&self) -> &Path {
        self.source.path()
    }

    /// Starts an agent on each node in place of the one before, and waits until both are in sync.
    pub fn restart_agents(&self) -> Result<()> {
        self.lab.start_agents(self.source.path(), &self.options)
    }
}
