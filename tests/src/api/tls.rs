//! TLS of the server: whose certificate it shows may change while it runs.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result};
use axum::serve;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer},
};

use super::Shared;

/// What a server's certificate names: where tests have it, the address at which the first of several is advertised, and, as
/// every real one, the ClusterIP that leads to all of them.
const NAMES: [&str; 4] = ["127.0.0.1", "192.0.2.10", "10.96.0.1", "kubernetes.default.svc"];

/// A certificate authority, and a server's certificate that it has signed.
#[derive(Clone, Debug)]
pub struct Authority {
    pem: String,
    config: Arc<ServerConfig>,
}

impl Authority {
    /// A new one.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        let server_key = KeyPair::generate()?;
        let names = CertificateParams::new(NAMES.map(str::to_owned))?;
        let certificate = names.signed_by(&server_key, &Issuer::new(params, key))?;
        let private = PrivateKeyDer::try_from(server_key.serialize_der()).map_err(anyhow::Error::msg)?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .context("the certificate does not fit its key")?;
        Ok(Self { pem, config: Arc::new(config) })
    }

    /// What clients trust.
    pub fn pem(&self) -> &str {
        &self.pem
    }
}

/// Takes connections, with TLS if there is an authority when they come.
pub(super) struct Listener {
    inner: TcpListener,
    shared: Arc<Shared>,
}

/// A connection, with TLS or without.
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

impl Listener {
    pub(super) fn new(inner: TcpListener, shared: Arc<Shared>) -> Self {
        Self { inner, shared }
    }

    async fn greet(&self, stream: TcpStream) -> std::io::Result<Box<dyn Socket>> {
        // As a real one: an event must not wait for the acknowledgement of the one before.
        stream.set_nodelay(true)?;
        let authority = self.shared.world().authority.clone();
        Ok(match authority {
            Some(authority) => Box::new(TlsAcceptor::from(authority.config).accept(stream).await?),
            None => Box::new(stream),
        })
    }
}

impl serve::Listener for Listener {
    type Io = Box<dyn Socket>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, address) = serve::Listener::accept(&mut self.inner).await;
            // A client that does not like the certificate goes, and may come again.
            if let Ok(socket) = self.greet(stream).await {
                return (socket, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}
