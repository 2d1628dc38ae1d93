// What the HTTP probes are pointed at: a health document, a page and an empty answer, on a free port that is printed.
'use strict';

const page = `<!doctype html><title>Bench</title>${'<p>A line of a page.</p>\n'.repeat(400)}`;
const answers = {
  '/api/health': ['application/json', () => JSON.stringify({ status: 'healthy', uptime: process.uptime() })],
  '/': ['text/html', () => page],
  '/empty': ['text/plain', () => ''],
};

const server = require('node:http').createServer((request, response) => {
  const [type, body] = answers[request.url] ?? ['text/plain', null];
  response.writeHead(body === null ? 404 : 200, { 'Content-Type': type });
  response.end(body === null ? 'not found\n' : body());
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
