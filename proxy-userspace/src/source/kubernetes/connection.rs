//! The connection to the API server: where it is, who we are, and how soon a dead peer is noticed.

use std::{path::Path, time::Duration};

use http::Uri;
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt as _, middleware::BaseUriLayer},
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::ServiceBuilder;

use super::servers::{Connection, Servers};
use crate::config::ApiServer;

/// An idle connection is probed this often in the time after which a silent peer is given up: a watch may have nothing to
/// say for minutes.
const PROBES: u32 = 3;
/// For the handshake.
const CONNECT: Duration = Duration::from_secs(10);
/// For the handshake when there is another server to turn to.
const CONNECT_ONE_OF_SEVERAL: Duration = Duration::from_secs(3);

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
pub(super) async fn open(settings: &ApiServer) -> Result<Client, OpenError> {
    // What is wrong with the settings is told now; what goes wrong later names the kind of object, not the server.
    let config = configuration(settings).await?;
    for server in servers(&config, settings)? {
        build(&config, &server, settings).map_err(|source| OpenError::Credentials(Box::new(source)))?;
        tracing::info!(%server, "the API server is");
    }
    Ok(ClientBuilder::new(Servers::new(settings.clone()), config.default_namespace).build())
}

/// What the files say now.
pub(super) async fn configuration(settings: &ApiServer) -> Result<Config, OpenError> {
    let urls = urls(settings)?;
    match (&settings.kubeconfig, urls.first()) {
        (Some(path), _) => from_kubeconfig(path).await,
        (None, Some(url)) => Ok(Config::incluster().unwrap_or_else(|_| Config::new(url.clone()))),
        (None, None) => Config::incluster().map_err(OpenError::NotInCluster),
    }
}

/// The servers that may be asked: never none.
pub(super) fn servers(config: &Config, settings: &ApiServer) -> Result<Vec<Uri>, OpenError> {
    let urls = urls(settings)?;
    Ok(if urls.is_empty() { vec![config.cluster_url.clone()] } else { urls })
}

fn urls(settings: &ApiServer) -> Result<Vec<Uri>, OpenError> {
    let parse = |url: &String| url.parse().map_err(|source| OpenError::Master { url: url.clone(), source });
    settings.urls.iter().map(parse).collect()
}

async fn from_kubeconfig(path: &Path) -> Result<Config, OpenError> {
    let error = |source| OpenError::Kubeconfig { path: path.into(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(error)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(error)
}

/// kube's own stack on a connector that notices a peer that is gone without a word.
pub(super) fn build(config: &Config, server: &Uri, settings: &ApiServer) -> Result<Connection, kube::Error> {
    let connector = config.rustls_https_connector_with_connector(connector(settings))?;
    let service = ServiceBuilder::new()
        .layer(BaseUriLayer::new(server.clone()))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build::<_, Body>(connector));
    Ok(Connection::new(service))
}

fn connector(settings: &ApiServer) -> HttpConnector {
    let probe = settings.silence / PROBES;
    let connect = if settings.urls.len() > 1 { CONNECT_ONE_OF_SEVERAL } else { CONNECT };
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect));
    connector.set_keepalive(Some(probe));
    connector.set_keepalive_interval(Some(probe));
    connector.set_tcp_user_timeout(Some(settings.silence));
    connector
}
