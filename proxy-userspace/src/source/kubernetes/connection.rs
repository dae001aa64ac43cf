//! The connection to the API server: where it is, who we are, and how soon a dead peer is noticed.

use std::time::Duration;

use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt as _},
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::ServiceBuilder;

use crate::config::ApiServer;

/// Data that is not acknowledged for this long, probes included, ends the connection (`TCP_USER_TIMEOUT`).
const SILENCE: Duration = Duration::from_secs(30);
/// An idle connection is probed this often: a watch may have nothing to say for minutes.
const PROBE: Duration = Duration::from_secs(10);
/// For the handshake.
const CONNECT: Duration = Duration::from_secs(10);

/// Why the API server's whereabouts are not known.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No kubeconfig that can be read.
    #[error("the kubeconfig {path} cannot be used: {source}; correct --kubeconfig, or use --source=file:DIR without a cluster", path = .path.display())]
    Kubeconfig {
        /// As given.
        path: std::path::PathBuf,
        /// What is wrong.
        source: Box<KubeconfigError>,
    },
    /// Neither in a pod nor told.
    #[error("not in a cluster ({0}): name the API server with --kubeconfig or --master, or use --source=file:DIR")]
    NotInCluster(#[source] InClusterError),
    /// Not a URL.
    #[error("--master {url:?} is not a URL: {source}")]
    Master {
        /// As given.
        url: String,
        /// What is wrong.
        source: http::uri::InvalidUri,
    },
    /// Certificates or credentials.
    #[error("the credentials for the API server cannot be used: {0}")]
    Credentials(#[source] Box<kube::Error>),
}

/// A client for the API server. It connects when it is used.
pub(super) async fn open(server: &ApiServer) -> Result<Client, OpenError> {
    let config = configuration(server).await?;
    // What goes wrong later names the kind of object, not the server.
    tracing::info!(server = %config.cluster_url, "the API server is");
    build(&config).map_err(|source| OpenError::Credentials(Box::new(source)))
}

async fn configuration(server: &ApiServer) -> Result<Config, OpenError> {
    let master = server.master.as_deref().map(parse_master).transpose()?;
    let mut config = match (&server.kubeconfig, &master) {
        (Some(path), _) => from_kubeconfig(path).await?,
        (None, Some(master)) => Config::incluster().unwrap_or_else(|_| Config::new(master.clone())),
        (None, None) => Config::incluster().map_err(OpenError::NotInCluster)?,
    };
    if let Some(master) = master {
        config.cluster_url = master;
    }
    Ok(config)
}

fn parse_master(url: &str) -> Result<http::Uri, OpenError> {
    url.parse().map_err(|source| OpenError::Master { url: url.into(), source })
}

async fn from_kubeconfig(path: &std::path::Path) -> Result<Config, OpenError> {
    let error = |source| OpenError::Kubeconfig { path: path.into(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(error)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(error)
}

/// kube's own stack on a connector that notices a peer that is gone without a word.
fn build(config: &Config) -> Result<Client, kube::Error> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_keepalive(Some(PROBE));
    connector.set_keepalive_interval(Some(PROBE));
    connector.set_tcp_user_timeout(Some(SILENCE));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build::<_, Body>(connector));
    Ok(ClientBuilder::new(service, config.default_namespace.clone()).build())
}
