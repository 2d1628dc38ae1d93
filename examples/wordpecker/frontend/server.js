'use strict';
/*
 * WordPecker's frontend: the files in public/, read once at the start (so no path from outside ever reaches the disk), and
 * three reading pages of the backend passed on, so that the page works through one port. GET /health says that this process is well.
 * Environment: HOST, PORT, BACKEND_URL.
 */
const fs = require('node:fs');
const http = require('node:http');
const path = require('node:path');
const { version } = require('../package.json');

const BACKEND = new URL(process.env.BACKEND_URL || 'http://127.0.0.1:3000');
if (BACKEND.protocol !== 'http:') throw new Error('BACKEND_URL must be an http:// address');
const PASSED_ON = new Set(['/api/health', '/api/ready', '/api/lists']);
const BACKEND_DEADLINE_MS = 3000;
const BACKEND_LIMIT = 1024 * 1024;
const GRACE_MS = 3000;
const JSON_TYPE = 'application/json; charset=utf-8';
const TYPES = { '.html': 'text/html; charset=utf-8', '.css': 'text/css; charset=utf-8', '.js': 'text/javascript; charset=utf-8', '.svg': 'image/svg+xml' };

const folder = path.join(__dirname, 'public');
const files = new Map(
  fs.readdirSync(folder).map((name) => [`/${name}`, { type: TYPES[path.extname(name)], content: fs.readFileSync(path.join(folder, name)) }]),
);
files.set('/', files.get('/index.html'));

const json = (status, value) => ({ status, type: JSON_TYPE, content: Buffer.from(`${JSON.stringify(value)}\n`) });

/** Ask the backend for `page`: a path from the fixed set, no header and no query of the caller's. */
function askBackend(page) {
  return new Promise((resolve) => {
    const gone = (why) => resolve(json(502, { error: `the backend ${why}` }));
    const asked = http.get(new URL(page, BACKEND), { signal: AbortSignal.timeout(BACKEND_DEADLINE_MS) }, async (reply) => {
      try {
        const parts = [];
        let size = 0;
        for await (const part of reply) {
          size += part.length;
          if (size > BACKEND_LIMIT) return gone('says too much');
          parts.push(part);
        }
        resolve({ status: reply.statusCode, type: JSON_TYPE, content: Buffer.concat(parts) });
      } catch {
        gone('broke off');
      }
    });
    asked.on('error', (error) => gone(error.name === 'TimeoutError' || error.name === 'AbortError' ? 'is silent' : 'cannot be reached'));
  });
}

async function answerTo({ method, url }) {
  if (method !== 'GET' && method !== 'HEAD') return { ...json(405, { error: 'GET only' }), headers: { Allow: 'GET, HEAD' } };
  const [page] = url.split('?', 1);
  if (page === '/health') return json(200, { status: 'healthy', timestamp: new Date().toISOString(), uptime: process.uptime(), version });
  if (PASSED_ON.has(page)) return askBackend(page);
  const file = files.get(page);
  return file ? { status: 200, ...file } : json(404, { error: 'no such page' });
}

const server = http.createServer(async (request, response) => {
  const { status, type, content, headers = {} } = await answerTo(request);
  if (response.destroyed) return;
  response.writeHead(status, {
    'Content-Type': type,
    'Content-Length': content.length,
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
    ...headers,
  });
  response.end(request.method === 'HEAD' ? undefined : content);
});
server.headersTimeout = 10_000;
server.requestTimeout = 15_000;

let stopping = false;
function shutDown(signal) {
  if (stopping) return;
  stopping = true;
  console.log(`${signal}: finishing the requests in hand`);
  setTimeout(() => process.exit(0), GRACE_MS).unref();
  server.close(() => process.exit(0));
  server.closeIdleConnections();
}
process.on('SIGINT', shutDown);
process.on('SIGTERM', shutDown);

server.listen(Number(process.env.PORT || 3001), process.env.HOST || '127.0.0.1', () => {
  const { address, port } = server.address();
  console.log(`wordpecker frontend ${version} listens on http://${address}:${port}, backend at ${BACKEND.origin}`);
  process.send?.('ready');
});
