//! Labels of metrics.

use axum::http::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;

use crate::progress::IpFamily;

/// `ip_family`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct FamilyLabel {
    ip_family: &'static str,
}

impl From<IpFamily> for FamilyLabel {
    fn from(family: IpFamily) -> Self {
        Self { ip_family: family.name() }
    }
}

/// `code`, of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct CodeLabel {
    code: u16,
}

impl From<StatusCode> for CodeLabel {
    fn from(code: StatusCode) -> Self {
        Self { code: code.as_u16() }
    }
}

/// Whose clients a traffic policy is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Those inside the cluster.
    Internal,
    /// Those outside.
    External,
}

impl Policy {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Internal, Self::External];
}

/// `ip_family` and `traffic_policy`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct PolicyLabel {
    ip_family: &'static str,
    traffic_policy: &'static str,
}

impl PolicyLabel {
    pub(super) fn new(family: IpFamily, policy: Policy) -> Self {
        let traffic_policy = match policy {
            Policy::Internal => "internal",
            Policy::External => "external",
        };
        Self { ip_family: family.name(), traffic_policy }
    }
}

/// `outcome`, of an Event that the API server was to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OutcomeLabel {
    outcome: &'static str,
}

impl OutcomeLabel {
    /// The server has it.
    pub(super) const PUBLISHED: Self = Self { outcome: "published" };
    /// The server did not take it.
    pub(super) const FAILED: Self = Self { outcome: "failed" };
    /// There were too many.
    pub(super) const SUPPRESSED: Self = Self { outcome: "suppressed" };
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::PUBLISHED, Self::FAILED, Self::SUPPRESSED];
}
